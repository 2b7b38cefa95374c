"""Verbs about models themselves: which there are, what one is made of, and joining parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from tercet.cli.options import DimsListOption, ModelName, Precision, ReadingOption, load
from tercet.errors import DataError, RecipeError
from tercet.files.console import columns, results, say
from tercet.files.outputs import check_output
from tercet.models.zoo import zoo

if TYPE_CHECKING:
    from tercet.models.tokens import Tokenizer

_COUNTED: Final = 1_000  # texts of each language, whose tokens are counted
_FEW: Final = 100  # texts; a range learned from fewer is unreliable


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


def inspect(
    model: Annotated[str, typer.Argument(help="Zoo name or folder of a model or an adapter.")],
) -> None:
    """Say what a model is: how it reads, its prompts, and the stages that made it.

    Example: tercet inspect runs/mine/model
    """
    from tercet.models.formats.manifest import manifest

    table = columns("what", "")
    for name, value in manifest(model).items():
        table.add_row(name, value)
    results().print(table)


def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapter folders, in the order they were trained.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the merged model.")],
    base: Annotated[
        str | None, typer.Option(help="What they go onto; None: what the first one names.")
    ] = None,
    attention: ReadingOption = None,
    compat: Annotated[
        Literal["llm2vec"] | None, typer.Option(help="llm2vec: read them as that package does.")
    ] = None,
) -> None:
    """Add adapters to the weights of their base, one after the other, and save one model.

    Example: tercet merge mntp-adapter simcse-adapter --base smollm2 --out merged
    """
    from tercet.models.merge import load_adapters

    _refuse_to_replace(out, "merging", [*adapters, base])
    embedder = load_adapters(adapters, base=base, compat=compat, attention=attention)
    embedder.save(out)
    results().print(f"{out}", soft_wrap=True)
    say(f"next: tercet inspect {out}")


def retokenize(
    base: Annotated[str, typer.Argument(help="Zoo name, folder or hub id of the model.")],
    tokenizer: Annotated[str, typer.Option(help="Of this model: zoo name, folder or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the model with that tokenizer.")],
    rows: Annotated[
        Literal["remap", "new"],
        typer.Option(help="A new token begins as the mean of its old pieces, or at random."),
    ] = "remap",
    texts: Annotated[
        Path | None,
        typer.Option(help="Examples (.jsonl, .parquet): count the tokens of their documents."),
    ] = None,
) -> None:
    """Give a model another model's tokenizer, to be trained with it.

    With --texts it says how many tokens a document has with either, by language.

    Example: tercet retokenize me5-small --tokenizer smollm2 --texts pairs.jsonl --out retokenized
    """
    from tercet.models.embedder import Embedder
    from tercet.models.formats.parts import tokenizer_of
    from tercet.models.retokenize import with_tokenizer

    _refuse_to_replace(out, "this", [base, tokenizer, texts])
    embedder = Embedder.load(base)
    stock, before = tokenizer_of(zoo.resolve(tokenizer, say)), embedder.tokenizer
    made = with_tokenizer(embedder, stock, rows=rows)
    if texts is not None:
        _show_lengths(texts, before, made.tokenizer)
    made.save(out, about={**made.about, "base": base, "tokenizer": tokenizer, "rows": rows})
    results().print(f"{out}", soft_wrap=True)
    say(f"next: tercet train arctic-embed --base {out} --data pairs.jsonl --out runs/mine")


def _show_lengths(texts: Path, before: "Tokenizer", after: "Tokenizer") -> None:
    """Print the mean tokens of a document with both tokenizers, by language."""
    from tercet.data.files.sources import iter_examples

    found: dict[str, list[str]] = {}
    for example in iter_examples(texts):
        some = found.setdefault(example.lang or "-", [])
        if len(some) < _COUNTED:
            some.append(example.positives[0])
    table = columns("lang", "documents", "tokens before", "tokens after", "ratio")
    for lang, documents in sorted(found.items()):
        was, now = _mean_tokens(before, documents), _mean_tokens(after, documents)
        table.add_row(lang, f"{len(documents):,}", f"{was:.1f}", f"{now:.1f}", f"{now / was:.2f}")
    results().print(table)


def _mean_tokens(tokenizer: "Tokenizer", texts: Sequence[str]) -> float:
    return sum(len(encoding.ids) for encoding in tokenizer.bare(texts)) / len(texts)


def _refuse_to_replace(out: Path, what: str, inputs: Sequence[str | Path | None]) -> None:
    from tercet.models.formats.tercet_folder import MODEL

    if out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None):
        raise RecipeError(f"{out}: exists already, and {what} would replace it; choose another")
    check_output(out, inputs, MODEL)


def calibrate(
    model: ModelName,
    texts: Annotated[
        Path, typer.Argument(help="Documents such as will be searched (.txt, .jsonl, .parquet).")
    ],
    dims: DimsListOption = None,
    save: Annotated[bool, typer.Option("--save", help="Keep them in the model's folder.")] = False,
    most: Annotated[int, typer.Option(min=1, help="Texts that are taken, at equal distances.")] = (
        5_000
    ),
    text_field: Annotated[str, typer.Option(help="Of a .jsonl or .parquet file.")] = "text",
    precision: Precision = "float32",
) -> None:
    """Learn the ranges in which coordinates become codes of 8, 4 and 1 bits.

    For each number of coordinates that is kept: the centre of these texts' vectors, and how far
    codes reach on either side of it, chosen for the smallest error. What is beyond it is cut. The
    error is the usual distance of a vector from what its codes stand for. With --save, eval and
    sizes use them from then on; the model's vectors and sentence-transformers' files stay as they
    are.

    Example: tercet calibrate runs/mine/model documents.jsonl --dims 256 --save
    """
    from tercet.data.files.texts import evenly_spaced, read_texts
    from tercet.evaluate.measures.retention import chosen_dims, code_errors
    from tercet.models.settings import require_settings, save_ranges
    from tercet.rank.quantized import Ranges, bytes_of, truncated

    folder = zoo.resolve(model, say)
    if save:
        require_settings(folder, "ranges of codes")
    taken = evenly_spaced((text for text in read_texts(texts, text_field) if text.strip()), most)
    if not taken:
        raise DataError(texts, None, "contains no text; give some thousands of documents")
    if len(taken) < _FEW:
        say(f"{texts}: {len(taken)} texts are few to learn a range from; give some thousands")
    embedder = load(model, precision)
    widths = chosen_dims(embedder, dims)
    vectors = embedder.encode(taken, "document", progress=True)
    found: dict[int, Ranges] = {}
    table = columns("coordinates", "codes", "range", "beyond it", "error", "bytes")
    for kept in widths:
        some = vectors if kept == embedder.dim else truncated(vectors, kept)
        found[kept] = Ranges.learned(some)
        for each in code_errors(found[kept], some):
            numbers = (f"{each.limit:.4f}", f"{each.beyond:.2%}", f"{each.error:.4f}")
            table.add_row(str(kept), each.precision, *numbers, str(bytes_of(each.precision, kept)))
    results().print(table)
    if save:
        save_ranges(folder, found)
        results().print(f"{folder}: saved these ranges", soft_wrap=True)
    else:
        say("nothing was saved; add --save to save them with the model")
