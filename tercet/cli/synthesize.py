"""The verb that generates questions about documents."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tercet.cli.options import Precision, load
from tercet.data.files.documents import Fields, read_documents
from tercet.errors import RecipeError
from tercet.files.console import columns, count_table, results, say, shortened
from tercet.files.outputs import check_files

if TYPE_CHECKING:
    from tercet.curate.synthesis.question_pairs import SynthesisReport

_SHOWN_FAILURES = 5


def synthesize(
    file: Annotated[Path, typer.Argument(help="Documents: .jsonl, .parquet or .txt.")],
    model: Annotated[str, typer.Option(help="What writes: a causal model, or with --url a name.")],
    out: Annotated[Path, typer.Option(help="The examples: a .jsonl or .parquet file.")],
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint, as http://host:8000/v1.")
    ] = None,
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the endpoint's key.")
    ] = None,
    documents: Annotated[int, typer.Option(min=1, help="At most, drawn at random.")] = 1000,
    samples: Annotated[int, typer.Option(min=1, help="Passages of each document.")] = 1,
    least: Annotated[int, typer.Option("--min", help="Characters of a passage, at least.")] = 300,
    most: Annotated[int, typer.Option("--max", help="And at most.")] = 1500,
    task: Annotated[str | None, typer.Option(help="Of the examples; None: the file's name.")] = (
        None
    ),
    prompt_file: Annotated[
        Path | None, typer.Option(help="A prompt of your own, with {passage} in it.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Of the documents, named in the prompt; None: not named.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the answers.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of the tokens that are drawn from.")] = 0.95,
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 64,
    check: Annotated[
        str | None, typer.Option(help="An embedder by which a question has to find its document.")
    ] = None,
    top: Annotated[int, typer.Option(help="Worst rank that passes.")] = 1,
    among: Annotated[int, typer.Option(help="Documents that are ranked.")] = 1000,
    against: Annotated[
        Literal["passages", "documents"], typer.Option(help="What stands for a document there.")
    ] = "passages",
    text_field: Annotated[str, typer.Option(help="Where the text is in a record.")] = "text",
    title_field: Annotated[str, typer.Option(help="Where the title is.")] = "title",
    id_field: Annotated[str, typer.Option(help="Where the id is.")] = "id",
    split: Annotated[str | None, typer.Option(help='Only records with this "split".')] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts a local model reads at once.")] = 8,
    workers: Annotated[int, typer.Option(help="Calls of an endpoint at a time.")] = 4,
    timeout: Annotated[float, typer.Option(help="Of a call, in seconds.")] = 60.0,
    retries: Annotated[int, typer.Option(help="Of a call that failed.")] = 4,
    work: Annotated[Path, typer.Option(help="Where the check's vectors stay.")] = Path(
        "runs/mining"
    ),
    precision: Precision = "float32",
) -> None:
    """Have a model write questions about passages of documents, as training examples.

    An example is a question and the whole document. Raw answers stay beside --out, in a file
    that ends in .log.jsonl: the same command continues a killed run and repeats failed calls,
    and another --check requests no answer twice.

    Example: tercet synthesize docs.jsonl --model smollm2 --check minilm --out questions.jsonl
    """
    from tercet.curate.synthesis.consistency import Consistency
    from tercet.curate.synthesis.endpoint import Calls, EndpointGenerator
    from tercet.curate.synthesis.generators import QuestionPrompt, TokenSampling
    from tercet.curate.synthesis.passages import PassageSampling
    from tercet.curate.synthesis.question_pairs import Synthesis, log_path
    from tercet.curate.synthesis.question_pairs import synthesize as run_synthesis
    from tercet.files.records import known_suffix

    known_suffix(out)
    for path in (out, log_path(out)):
        check_files([file, prompt_file, model, check], out=path)
    prompt = QuestionPrompt(language=language)
    if prompt_file is not None:
        prompt = QuestionPrompt.of_file(prompt_file, language)
    passages = PassageSampling(
        documents=documents, samples=samples, least=least, most=most, seed=seed
    )
    tokens = TokenSampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    if url is not None:
        calls = Calls(workers=workers, timeout_seconds=timeout, retries=retries)
        generator = EndpointGenerator(url, model, tokens, key_variable=key_variable, calls=calls)
    elif key_variable is not None:
        raise RecipeError("--key-variable is for an endpoint; give its --url as well")
    else:
        generator = _local(model, tokens, batch, precision)
    consistency = None
    if check is not None:
        consistency = Consistency(
            embedder=load(check, precision), top=top, among=among, against=against, work=work
        )
    fields = Fields(text=text_field, title=title_field, id=id_field)
    report = run_synthesis(
        partial(read_documents, file, fields, split=split),
        out,
        generator,
        Synthesis(task=task or out.stem, sampling=passages, prompt=prompt, check=consistency),
    )
    _show(report, checked=check is not None)
    say(f"raw answers stay in {log_path(out)}: another --check needs no new ones")
    if not report.kept:
        raise RecipeError(f"{out}: not written: no question is left; the table says why")


def _local(model: str, tokens: Any, batch: int, precision: str) -> Any:
    import torch

    from tercet.curate.synthesis.generators import LocalGenerator

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, precision)
    return LocalGenerator(model, tokens, batch=batch, dtype=dtype, device=device)


def _show(report: "SynthesisReport", *, checked: bool) -> None:
    counts = {
        "documents drawn": report.documents,
        **({"without a passage": report.unusable} if report.unusable else {}),
        "passages": report.passages,
        "answered before": report.answered_before,
        "answered now": report.answered,
        "failed calls": report.failed,
        **{f"refused: {reason}": count for reason, count in report.refused.items()},
        "duplicates": report.duplicates,
    }
    if checked:
        counts[f"inconsistent, among {report.checked_among:,}"] = report.inconsistent
    counts["kept"] = report.kept
    thirds = columns("third of the document", "asked", "kept")
    for name, asked, kept in zip(
        ("first", "second", "last"), report.asked_thirds, report.kept_thirds, strict=True
    ):
        thirds.add_row(name, f"{asked:,}", f"{kept:,}")
    results().print(count_table("what", "count", counts))
    results().print(thirds)
    if report.answered:
        say(f"{report.answered:,} answers in {report.seconds:.0f} s")
    for failure, count in report.failures.most_common(_SHOWN_FAILURES):
        say(f"tercet: note: {count:,} calls failed: {shortened(failure)}")
