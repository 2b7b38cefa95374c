"""Options that several commands share, and what their values mean."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import typer

from tercet.errors import MissingExtraError, RecipeError
from tercet.files.artifacts import json_text, write_json
from tercet.files.console import results, say
from tercet.files.records import meant
from tercet.kinds import KINDS, Kind

if TYPE_CHECKING:
    from tercet.curate.jobs.runners import Runner, RunnerName
    from tercet.data.files.examples import ExampleFields
    from tercet.data.files.scan import RecordFormat, ReportProgress
    from tercet.data.files.sources import Source
    from tercet.models.devices import NumberType

Number = TypeVar("Number", int, float)

_PARTS: Final = 1000  # of a progress bar

# Panels of a help text. A command shows its own panels first, then these in this order.
DATA: Final = "Data"
MODEL: Final = "Model"
VECTORS: Final = "Vectors"
READING: Final = "How texts are read"
TRAINING: Final = "Training"
MEASURE: Final = "Measure"
OUTPUT: Final = "Output"
MACHINE: Final = "Machine"
CLUSTER: Final = "Several processes"


def model_names(incomplete: str) -> list[str]:
    """Return the models that a word may become: names of the zoo, and folders."""
    from tercet.models.zoo import zoo

    start = Path(incomplete)
    parent, name = (start, "") if incomplete.endswith("/") else (start.parent, start.name)
    found = [model.name for model in zoo.MODELS if model.name.startswith(incomplete)]
    with suppress(OSError):
        inside = sorted(parent.iterdir()) if incomplete else []
        found += [f"{each}/" for each in inside if each.name.startswith(name) and each.is_dir()]
    return found


def local_inputs(context: Any, given: Any) -> Any:
    """Return the files that paths of one parameter name, with copies for ``-`` and ``hf://``.

    Raises:
        RecipeError: if ``-`` is given twice, also by two parameters.
    """
    paths = given if isinstance(given, list | tuple) else [given]
    names = [str(path) for path in paths if path is not None]
    if context.resilient_parsing or not any(it == "-" or it.startswith("hf:/") for it in names):
        return given
    from tercet.data.files.inputs import STDIN, local_path

    context.meta[STDIN] = context.meta.get(STDIN, 0) + names.count(STDIN)
    if context.meta[STDIN] > 1:
        raise RecipeError('"-" is given twice, but standard input can be read only once')
    found = [None if path is None else local_path(path) for path in paths]
    return found if isinstance(given, list | tuple) else found[0]


def model_option(text: str, *flags: str) -> Any:
    """Return the option of a model, with the help of one command."""
    return typer.Option(
        *(flags or ("--model",)), help=text, rich_help_panel=MODEL, autocompletion=model_names
    )


ModelOption = Annotated[str, model_option("Zoo name, folder or hub id (see: tercet list-models).")]
MaybeModelOption = Annotated[
    str | None, model_option("Zoo name, folder or hub id (see: tercet list-models).")
]
CompareWithOption = Annotated[
    list[str] | None,
    model_option("Another model to compare with. Repeat for more.", "--compare-with"),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Device such as cpu, cuda or cuda:1. Default: a GPU if there is one.",
        rich_help_panel=MACHINE,
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        "--dtype",
        help="Type of the weights in memory. Default: bfloat16 on a GPU that computes in it, else "
        "float32.",
        rich_help_panel=MACHINE,
    ),
]
FastDtypeOption = Annotated[
    Literal["float32", "bfloat16"] | None,
    typer.Option(
        "--dtype",
        help="Type of the weights in memory. Default: bfloat16 where it is faster and, on a CPU, "
        "the mean cosine to float32 is at least 0.9999; else float32.",
        rich_help_panel=MACHINE,
    ),
]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        min=1,
        help="Tokens encoded together. Default: 2,048 on a CPU; on a GPU by its memory and the "
        "size of the model.",
        rich_help_panel=MACHINE,
    ),
]
StoreAsOption = Annotated[
    Literal["float32", "int8", "int4", "binary", "binary+int8"],
    typer.Option(
        "--store-as",
        help="How dense vectors of documents are stored; binary+int8 searches by bits, and scores "
        "the hits by int8.",
        rich_help_panel=VECTORS,
    ),
]


class KindName(StrEnum):
    """The kinds of vectors, as a type of which a flag may have several values."""

    dense = "dense"
    sparse = "sparse"
    multi = "multi"


def kind_option(text: str) -> Any:
    """Return ``--kind`` with the help of one command."""
    return typer.Option("--kind", metavar="KIND", help=text, rich_help_panel=VECTORS)


KindOption = Annotated[
    list[KindName] | None,
    kind_option("dense, sparse or multi. Repeat for more. Default: all that the model makes."),
]
KindWeightOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kind-weight",
        metavar="KIND=NUMBER",
        help="Weight of a kind in the sum, such as sparse=0.3. Repeat for more. Default: the "
        "model's.",
        rich_help_panel=VECTORS,
    ),
]
DimsOption = Annotated[
    int | None,
    typer.Option(
        "--dims",
        min=1,
        help="Keep this many leading coordinates of dense vectors. Default: all.",
        rich_help_panel=VECTORS,
    ),
]
WidthsOption = Annotated[
    list[int] | None,
    typer.Option(
        "--dims",
        min=1,
        help="Keep this many leading coordinates of dense vectors. Repeat for more. Default: the "
        "widths that the model was trained for.",
        rich_help_panel=VECTORS,
    ),
]
SaveOption = Annotated[
    bool,
    typer.Option("--save", help="Save the result with the model.", rich_help_panel=OUTPUT),
]
MetricOption = Annotated[
    str,
    typer.Option("--metric", help="Metric such as ndcg@10 or recall@100.", rich_help_panel=MEASURE),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Use the model's prompts for this task. Default: its usual prompts.",
        rich_help_panel=READING,
    ),
]
AttentionOption = Annotated[
    Literal["causal", "bidirectional"] | None,
    typer.Option(
        "--attention",
        help="Direction in which a decoder reads. Default: the one it was trained with.",
        rich_help_panel=READING,
    ),
]
PoolOption = Annotated[
    Literal["mean", "weighted_mean", "first", "last"] | None,
    typer.Option(
        "--pooling",
        help="How token states become one vector. Default: the model's pooling.",
        rich_help_panel=READING,
    ),
]
EchoOption = Annotated[
    bool,
    typer.Option(
        "--echo",
        help="Read each text twice; pool the second copy.",
        rich_help_panel=READING,
    ),
]
QueryTokensOption = Annotated[
    int | None,
    typer.Option(
        "--query-tokens",
        min=1,
        help="Maximum number of query tokens; longer queries are cut. Default: the model's limit.",
        rich_help_panel=READING,
    ),
]
DocumentTokensOption = Annotated[
    int | None,
    typer.Option(
        "--document-tokens",
        min=1,
        help="Maximum number of document tokens; longer documents are cut. Default: the model's "
        "limit.",
        rich_help_panel=READING,
    ),
]
TestDataOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--test-data",
        help="Test file or folder whose texts must not be in training data. Repeat for more.",
        callback=local_inputs,
        rich_help_panel=DATA,
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split",
        help='Split of a folder of BEIR, or "split" of records.',
        rich_help_panel=DATA,
    ),
]


def field_option(name: str, what: str) -> Any:
    """Return the option that names a column of the user's files."""
    return typer.Option(
        f"--{name}-field", help=f"Field of a record that holds {what}.", rich_help_panel=DATA
    )


TextFieldOption = Annotated[str, field_option("text", "the text")]
TitleFieldOption = Annotated[str, field_option("title", "the title")]
IdFieldOption = Annotated[str, field_option("id", "the id")]
LabelFieldOption = Annotated[str, field_option("label", "the label")]
QueryFieldOption = Annotated[str | None, field_option("query", "the query")]
PositiveFieldOption = Annotated[str | None, field_option("positive", "the positives")]
NegativeFieldOption = Annotated[str | None, field_option("negative", "the negatives")]
WorkOption = Annotated[
    Path,
    typer.Option(
        "--work",
        help="Folder for intermediate results, so that a killed run goes on. May be deleted.",
        rich_help_panel=OUTPUT,
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        help="Seed of all that is drawn at random.",
        rich_help_panel=MACHINE,
    ),
]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write all figures to this file; - prints JSON instead of tables.",
        rich_help_panel=OUTPUT,
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", help="Draw a picture into this PNG file.", rich_help_panel=OUTPUT),
]
RunnerChoice = Annotated[
    Literal["auto", "loop", "daft", "ray"],
    typer.Option(
        "--runner",
        help="What distributes the work. auto: a loop, or Daft for several --workers.",
        rich_help_panel=CLUSTER,
    ),
]
WorkersChoice = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Processes on each machine. Default: one for each GPU, or one.",
        rich_help_panel=CLUSTER,
    ),
]
AddressChoice = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Address of a Ray cluster: HOST:PORT of its head, or auto.",
        rich_help_panel=CLUSTER,
    ),
]


def out_option(text: str) -> Any:
    """Return ``--out`` with the help of one command."""
    return typer.Option("--out", help=text, rich_help_panel=OUTPUT)


@dataclass(frozen=True, slots=True)
class Figures:
    """Where the figures of a command go: tables on standard output, and JSON with ``--json``."""

    json: Path | None

    @property
    def file(self) -> Path | None:
        """The file of ``--json``; None for standard output."""
        return None if self.as_json else self.json

    @property
    def as_json(self) -> bool:
        """Whether JSON takes the place of tables."""
        return self.json is not None and str(self.json) == "-"

    def print(self, *shown: Any, **style: Any) -> None:
        """Print tables and lines of results, unless JSON takes their place."""
        if not self.as_json:
            results().print(*shown, **style)

    def write(self, record: Any) -> None:
        """Write the figures as JSON, if that is wanted."""
        if self.as_json:
            results().print(json_text(record, default=plain), soft_wrap=True, end="")
        elif self.json is not None:
            write_json(self.json, record, default=plain)


def plain(value: Any) -> Any:
    """Return what JSON can hold for a dataclass or a path."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def load(
    model: str,
    dtype: str | None = None,
    *,
    device: str | None = None,
    batch_tokens: int | None = None,
    **how: Any,
) -> Any:
    """Load an embedder; ``how`` sets such as attention, pooling and echo; None changes nothing."""
    import torch

    from tercet.models.devices import find_device, number_type
    from tercet.models.embedder import Embedder
    from tercet.models.network.cpu.precision import warning_of

    wanted = {name: value for name, value in how.items() if value}
    place = find_device(device)
    kind = getattr(torch, dtype or number_type(place))
    if (warning := warning_of(kind, place)) is not None:
        say(f"tercet: note: {warning}")
    embedder = Embedder.load(model, dtype=kind, **wanted).to(place)
    if batch_tokens is not None:
        embedder.batch_tokens = batch_tokens
    return embedder


def chosen_dtype(
    dtype: "NumberType | None", device: str | None, model: str | None = None
) -> "NumberType":
    """Return the type of weights that ``--dtype`` names, or the usual one of the device.

    With a ``model``, that is the fastest one with nearly the same vectors.
    """
    from tercet.models.devices import find_device, number_type
    from tercet.models.fastest import fastest_type

    place = find_device(device)
    if dtype is not None or model is None:
        return dtype or number_type(place)
    return fastest_type(model, place, say)


def runner_of(
    engine: "RunnerName",
    workers: int | None,
    address: str | None,
    device: str | None,
    *,
    alone: bool = False,
) -> "Runner":
    """Return where a job is done: by default one process for each GPU, or one if it is ``alone``.

    A device with a number is used by all processes, others share the GPUs of the machine.
    """
    from tercet.curate.jobs.runners import Runner

    shares = device in (None, "cuda")
    if workers is None:
        here = engine in ("auto", "daft") and "RANK" not in os.environ
        workers = _gpus() if shares and here and not alone else 1
        if workers > 1 and not has_package("daft"):
            say(
                f"tercet: note: one of {workers} GPUs is used; to use all, install Daft: pip "
                'install "tercet[bulk]"'
            )
            workers = 1
    return Runner(engine=engine, workers=workers, address=address, own_gpus=shares)


def _gpus() -> int:
    """Return the number of GPUs here, at least 1."""
    import torch

    return max(1, torch.cuda.device_count())


def known_models(model: str, others: Sequence[str] | None) -> list[str]:
    """Return all models, each once; an unknown one raises before the first is loaded."""
    from tercet.models.zoo import zoo

    names: list[str] = list(dict.fromkeys([model, *(others or [])]))
    for name in names:
        zoo.resolve(name, say)
    return names


def where(model: str) -> str:
    """Return the full path of a model, so that an index finds it from any working directory."""
    from tercet.models.zoo import zoo

    is_name = zoo.find(model) is not None or not Path(model).exists()
    return model if is_name else str(Path(model).resolve())


def in_order(named: Iterable[str] | None) -> tuple[Kind, ...] | None:
    """Return the kinds that ``--kind`` names, each once, in the usual order; None if none."""
    some = set(named or ())
    return tuple(kind for kind in KINDS if kind in some) or None


def changed_weights(given: Sequence[str] | None) -> dict[Kind, float] | None:
    """Return the weights by kind that ``--kind-weight`` gives; None if it is not given.

    Raises:
        RecipeError: for an unknown kind, or a value without a number.
    """
    found: dict[Any, float] = numbers_of(given, "kind-weight", float, example="sparse=0.3")
    if unknown := next((name for name in found if name not in KINDS), None):
        raise RecipeError(
            f"--kind-weight {unknown}: there is no such kind{meant(unknown, KINDS)}; kinds are "
            f"{', '.join(KINDS)}"
        )
    return found or None


def has_package(name: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return find_spec(name) is not None


def require_package(name: str, what: str, extra: str) -> None:
    """Raise, before any work, unless a package that ``what`` needs is installed.

    Raises:
        MissingExtraError: with the extra that brings it.
    """
    if not has_package(name):
        raise MissingExtraError(what, extra)


def fields_of(
    query: str | None, positive: str | None, negative: str | None
) -> "ExampleFields | None":
    """Return the names of fields that --query-field and the like give; None without them."""
    from tercet.data.files.examples import ExampleFields

    given = {"query": query, "positives": positive, "negatives": negative}
    named = {name: field for name, field in given.items() if field is not None}
    return ExampleFields(**named) if named else None


def opened(
    path: Path,
    *,
    weight: float = 1.0,
    fields: "ExampleFields | None" = None,
    record_format: "RecordFormat | None" = None,
) -> "list[Source]":
    """Open the sources of a file or a folder, with a progress bar; None reads examples.

    Raises:
        DataError: at the first invalid record.
    """
    from tercet.data.files.folders import open_sources
    from tercet.data.files.scan import example_format

    record_format = record_format or example_format(fields)
    with shown_progress(f"read {path.name}") as progress:
        return open_sources(path, weight=weight, progress=progress, record_format=record_format)


def numbers_of(
    given: Sequence[str] | None,
    flag: str,
    number: Callable[[str], Number],
    *,
    example: str = "news/de=2",
) -> dict[str, Number]:
    """Return the numbers by name of a flag such as ``--weight news=2``.

    Raises:
        RecipeError: for a value of another form, or a name that occurs twice.
    """
    found: dict[str, Number] = {}
    for text in given or ():
        name, _, value = text.rpartition("=")
        if name in found:
            raise RecipeError(f"--{flag} names {name!r} twice; leave one of them out")
        with suppress(ValueError):
            found[name] = number(value)
        if not name or name not in found:
            raise RecipeError(f"--{flag} is {text!r}; write NAME=NUMBER, as in {example}")
    return found


@contextmanager
def shown_progress(label: str) -> "Iterator[ReportProgress]":
    """Show a bar for a job that reports the share of it that is done."""
    from tercet import distributed
    from tercet.files.progress import bar

    with bar(label, _PARTS, shown=distributed.is_main()) as advance:
        done = 0

        def report(part: float) -> None:
            nonlocal done
            now = int(part * _PARTS)
            advance(now - done)
            done = now

        yield report
