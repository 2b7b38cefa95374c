"""The command ``train``: a recipe, its data, and the settings that differ from the defaults."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from tercet.cli.options import (
    DATA,
    MACHINE,
    MODEL,
    NegativeFieldOption,
    PositiveFieldOption,
    QueryFieldOption,
    TextFieldOption,
    fields_of,
    local_inputs,
    model_option,
    numbers_of,
    opened,
    out_option,
)
from tercet.errors import RecipeError
from tercet.files.console import columns, results, say
from tercet.files.outputs import check_output
from tercet.files.records import meant
from tercet.recipes.catalog import RECIPES, DataFormat, RecipeEntry, recipe_named

if TYPE_CHECKING:
    from tercet.data.files.examples import ExampleFields
    from tercet.data.files.sources import Source
    from tercet.recipes.settings import Setting, Training
    from tercet.training.recipe import Recipe

SETTINGS: Final = "Settings"
_PART_TITLES: Final = {"": "the whole run", "run": "this machine"}
Files = Mapping[str, Sequence[Path]]
"""The files that are named for each stage; those of all stages under an empty name."""


def recipe_names(incomplete: str) -> list[tuple[str, str]]:
    """Return the recipes that a word may become, with what they are for."""
    return [(n, each.summary) for n, each in RECIPES.items() if n.startswith(incomplete)]


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="finetune, llm2vec, nv-embed, bge-m3, arctic-embed or distil.",
            autocompletion=recipe_names,
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[STAGE=]FILE",
            help="Training data: a file or folder for every stage that has none named for it, or "
            "STAGE=FILE for one stage. Repeat for more.",
            rich_help_panel=DATA,
        ),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option(
            help="Examples to measure on while training; the best weights are kept.",
            callback=local_inputs,
            rich_help_panel=DATA,
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="How often an epoch uses the examples of a source (news=2) or of one of its "
            "languages (news/de=0.5). Repeat for more.",
            rich_help_panel=DATA,
        ),
    ] = None,
    count: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="How many examples of a source or language an epoch uses. Repeat for more.",
            rich_help_panel=DATA,
        ),
    ] = None,
    query_field: QueryFieldOption = None,
    positive_field: PositiveFieldOption = None,
    negative_field: NegativeFieldOption = None,
    text_field: TextFieldOption = "text",
    model: Annotated[
        str | None,
        model_option("Model to start from: zoo name, folder or hub id. Default: the recipe's."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Model whose vectors are learned, of recipes that have a teacher.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    keep_layers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Start with this many of the model's layers. Default: the recipe's.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Optimizer steps of the whole run, divided among its stages. Default: the "
            "recipe's.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of all that is drawn at random.", rich_help_panel=SETTINGS),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change a setting, such as batch_size=32 or unified.negatives=7. Repeat for more.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            help="Read settings from a TOML file, or from the recipe.json of an earlier run.",
            rich_help_panel=SETTINGS,
        ),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="List all settings of the recipe with defaults, units and meanings, and stop.",
            rich_help_panel=SETTINGS,
        ),
    ] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Check everything, print stages, steps, batches, time and memory, and stop.",
            rich_help_panel=SETTINGS,
        ),
    ] = False,
    out: Annotated[
        Path | None, out_option("Folder of the run; the model goes to its folder model.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device such as cpu, cuda or cuda:1. Default: a GPU if there is one.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(
            help="Type of matrix products; weights stay float32. Default: bfloat16 on a GPU that "
            "computes in it, else float32.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
) -> None:
    """Train an embedder by a recipe.

    finetune: any model, on pairs of a query and a document. llm2vec: a decoder becomes an encoder,
    from plain texts. nv-embed: instruction tuning on many tasks. bge-m3: dense, sparse and
    multi-vector retrieval from one model. arctic-embed: pretraining on many sources and languages,
    then mined negatives. distil: a small student learns a teacher's vectors, from plain texts.

    A run that was killed goes on when the same command is given again.

    Examples:
        tercet train finetune --data pairs.jsonl --dev dev.jsonl --out runs/mine
        tercet train bge-m3 --data mined.jsonl --steps 300 --set unified.negatives=3 --plan
    """
    entry = recipe_named(recipe)
    if explain:
        _explain(recipe, entry)
        return
    shorthand = {"model": model, "teacher": teacher, "keep_layers": keep_layers}
    shorthand |= {"steps": steps, "seed": seed}
    shorthand |= {"run.device": device, "run.dtype": dtype}
    chosen = _training(entry, recipe, file, changes or (), shorthand)
    files = _files(data or (), entry)
    named = [path for some in files.values() for path in some]
    if out is None and not plan:
        raise RecipeError("--out is missing: name the folder of the run, as in --out runs/mine")
    if out is not None:
        from tercet.training.plan import RUN

        check_output(out, [*named, dev], RUN)
    weights, counts = numbers_of(weight, "weight", float), numbers_of(count, "count", int)

    fields = fields_of(query_field, positive_field, negative_field)

    def sources(made: "Recipe") -> "dict[str, list[Source]]":
        return _weighed(stage_data(made, entry, files, text_field, fields), weights, counts)

    _run(chosen, sources, out, dev and partial(_score, dev, fields), only_plan=plan)


# ---- settings --------------------------------------------------------------------------------


def _training(
    entry: RecipeEntry,
    name: str,
    file: Path | None,
    changes: Sequence[str],
    shorthand: Mapping[str, Any],
) -> "Training":
    """Return the recipe and run of a file, the options and --set, which counts most."""
    from tercet.recipes.settings import built, checked, from_file, from_words

    given = {} if file is None else from_file(entry, name, file)
    options = checked(entry, {key: v for key, v in shorthand.items() if v is not None})
    words = from_words(entry, changes)
    if twice := sorted(options.keys() & words.keys()):
        flag = twice[0].removeprefix("run.")
        raise RecipeError(f"--{flag} and --set {twice[0]} give the same setting; remove one")
    return built(entry, given | options | words)


def _explain(name: str, entry: RecipeEntry) -> None:
    """Print all settings of a recipe, by the part of the run that they belong to."""
    from tercet.recipes.settings import settings_of

    out = results()
    out.print(f"{name}: {entry.summary}\n", style="bold")
    out.print(_stages_line(entry), soft_wrap=True)
    parts: dict[str, list[Setting]] = {}
    for setting in settings_of(entry).values():
        parts.setdefault(setting.part, []).append(setting)
    run = parts.pop("run")
    for part, settings in {**parts, "run": run}.items():
        title = _PART_TITLES.get(part, f"stage {part}")
        table = columns("setting", "default", "unit", "meaning")
        for each in settings:
            table.add_row(each.name, shown(each.default), each.unit or "-", each.full_meaning)
        out.print(f"\n{title}", style="bold")
        out.print(table)
    out.print(f"\nExample: tercet train {entry.example} --set seed=1", soft_wrap=True)


def _stages_line(entry: RecipeEntry) -> str:
    """Describe what each stage reads."""
    parts = []
    for stage, reads in entry.stages.items():
        if reads.shares == "never":
            how = f"only --data {stage}=FILE"
        elif len(entry.stages) == 1:
            how = "--data FILE"
        else:
            also = "and" if reads.shares == "beside" else "or"
            how = f"--data FILE {also} --data {stage}=FILE"
        parts.append(f"{stage} reads {reads.format} ({how})")
    return "\n".join(parts)


def shown(value: Any) -> str:
    """Return a value in the form that ``--set NAME=`` takes; "-" if it is None or empty."""
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- data ------------------------------------------------------------------------------------


def _files(given: Sequence[str], entry: RecipeEntry) -> Files:
    """Return the files of each stage, from words such as ``unified=mined.jsonl``."""
    from tercet.data.files.inputs import STDIN, local_path

    if sum(word.rpartition("=")[2] == STDIN for word in given) > 1:
        raise RecipeError("--data - is given twice, but standard input can be read only once")
    found: dict[str, list[Path]] = {}
    for word in given:
        stage, equals, file = word.partition("=")
        if not equals or Path(word).exists():
            stage, file = "", word
        elif stage not in entry.stages:
            raise RecipeError(
                f"--data {word}: there is no stage {stage!r}{meant(stage, entry.stages)}, and no "
                f"such file; the stages are {', '.join(entry.stages)}"
            )
        found.setdefault(stage, []).append(local_path(file))
    return found


def stage_data(
    recipe: "Recipe",
    entry: RecipeEntry,
    files: Files,
    text_field: str,
    fields: "ExampleFields | None" = None,
) -> "dict[str, list[Source]]":
    """Return the sources of each stage, opened; a file that several stages read is opened once."""
    known: dict[tuple[Path, DataFormat], list[Source]] = {}
    found: dict[str, list[Source]] = {}
    used = set()
    for stage in recipe.stages:
        reads = entry.stages[stage.name]
        own, common = files.get(stage.name, ()), files.get("", ())
        taken: list[tuple[Path, DataFormat]] = []
        if reads.shares == "beside" or (reads.shares == "instead" and not own):
            taken.extend((path, entry.format) for path in common)
        taken.extend((path, reads.format) for path in own)
        if not taken:
            what = "" if reads.shares == "never" else "--data FILE or "
            raise RecipeError(
                f"the stage {stage.name} needs {reads.format}, but no data is given for it; give "
                f"{what}--data {stage.name}=FILE"
            )
        used |= {path for path, _ in taken}
        for path, kind in taken:
            if (path, kind) not in known:
                known[path, kind] = _opened(path, kind, text_field, fields)
        found[stage.data] = [source for key in taken for source in known[key]]
    for stage, paths in files.items():
        if idle := [path for path in paths if path not in used]:
            running = ", ".join(stage.name for stage in recipe.stages)
            word = f"{stage}={idle[0]}" if stage else str(idle[0])
            raise RecipeError(
                f"--data {word}: no stage reads it (stages: {running}); remove it, or add the "
                "stage that does with --set stages=..."
            )
    return found


def _opened(
    path: Path, kind: DataFormat, text_field: str, fields: "ExampleFields | None"
) -> "list[Source]":
    from tercet.data.files.scan import example_format
    from tercet.data.files.texts import text_format

    record_format = text_format(text_field) if kind == "texts" else example_format(fields)
    return opened(path, record_format=record_format)


def _weighed(
    data: "dict[str, list[Source]]",
    weights: Mapping[str, float | int],
    counts: Mapping[str, int],
) -> "dict[str, list[Source]]":
    """Return every mixture with the weights that were given by name."""
    from tercet.data.batches.mixture import names_some, refuse_unknown, weighed

    refuse_unknown([*weights, *counts], [source for some in data.values() for source in some])
    return {
        name: weighed(
            some,
            {key: value for key, value in weights.items() if names_some(key, some)},
            {key: value for key, value in counts.items() if names_some(key, some)},
        )
        for name, some in data.items()
    }


# ---- the run ---------------------------------------------------------------------------------


def _run(
    training: "Training",
    data: "Callable[[Recipe], dict[str, list[Source]]]",
    out: Path | None,
    dev: Callable[[], Callable[[Any], Any]] | None,
    *,
    only_plan: bool,
) -> None:
    from tercet import distributed
    from tercet.training.forecast import lines_of
    from tercet.training.loop import forecast, train

    distributed.start()
    try:
        training.run.find_device()  # raises before data are read
        sources = data(training.recipe)
        score = None if dev is None else dev()
        if only_plan:
            lines = lines_of(forecast(training.recipe, sources, run=training.run))
            if distributed.is_main():
                results().print("\n".join(lines), soft_wrap=True)
            return
        assert out is not None, "checked by the caller"
        tell = say if distributed.is_main() else (lambda line: None)
        train(training.recipe, sources, out, score=score, run=training.run, say=tell)
        if distributed.is_main():
            results().print(f"{out / 'model'}", soft_wrap=True)
            say(f"next: tercet index docs.jsonl --model {out / 'model'} --out {out / 'index'}")
    finally:
        distributed.stop()


def _score(dev: Path, fields: "ExampleFields | None") -> Callable[[Any], Any]:
    from tercet.evaluate.measures.by_kind import dev_score
    from tercet.evaluate.measures.prompts import task_names
    from tercet.evaluate.sets.retrieval_set import RetrievalSet

    task = task_names(dev, examples=True, fields=fields)[0]
    return dev_score(RetrievalSet.from_examples(dev, fields=fields), task)
