"""The command ``study``: train and measure the cells of a study file, and compare them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Annotated, Any, Final, get_args

import typer

from tercet.cli.help import SETTINGS, Command
from tercet.cli.options import (
    DATA,
    MACHINE,
    OUTPUT,
    DeviceOption,
    DtypeOption,
    numbers_of,
    opened,
    out_option,
)
from tercet.data.files.scan import EXAMPLE_FORMAT
from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.files.console import columns, results, say
from tercet.files.outputs import check_output, mark

_STUDY, _CELLS = "Study", "Cells"  # panels
_FLAG_TYPES: Final[Mapping[Any, Any]] = {
    list[Source]: list[Path],
    list[Source] | None: list[Path] | None,
}
"""Types of a study's parameters that stand for files to open, and those of their flags."""


def study(
    file: Annotated[Path, typer.Argument(help="Study file; its own flags follow it.")],
    flags: Annotated[list[str] | None, typer.Argument(help="Flags of the study.")] = None,
) -> None:
    """Train models that differ in one thing each, measure them alike, and compare them in tables.

    Each study file has its own flags: tercet study FILE --help shows them. A killed study goes on
    when the same command is given again. Writes table.md, results.json and pictures; the answers
    of each model stay in cells/.

    Example:
        tercet study examples/studies/bge_m3.py --data mined.jsonl --test test.jsonl --out runs/m3
    """
    app_of(file)(flags or [], prog_name=f"tercet study {file}")


def app_of(file: Path) -> typer.Typer:
    """Return the command of a study file, with a flag for each parameter of its ``study``.

    Raises:
        RecipeError: if there is no such file, or no such function in it.
    """
    function = _function_of(file)
    own = dict(inspect.signature(function).parameters)
    gets_out = own.pop("out", None) is not None

    def command(**flags: Any) -> None:
        from tercet.studies.cells import STUDY

        given = {name: flags.pop(name) for name in own}
        check_output(flags["out"], [file, *_paths_in(given)], STUDY)
        if gets_out:
            mark(flags["out"], STUDY)
        values = {name: _opened(own[name], value) for name, value in given.items()}
        _weigh(values, numbers_of(flags.pop("weight"), "weight", float))
        if gets_out:
            values["out"] = flags["out"]
        changed = {n: v for n, v in given.items() if v != own[n].default and not _is_path(v)}
        facts = {"study": file.name, **changed, "flags": given}
        _run(function(**values), facts, **flags)

    _, _, *common = inspect.signature(_run).parameters.values()
    flags = [*map(_as_flag, own.values()), *common]
    command.__signature__ = inspect.Signature(flags)  # pyright: ignore
    command.__annotations__ = {flag.name: flag.annotation for flag in flags}
    command.__doc__ = function.__doc__
    app = typer.Typer(**SETTINGS)
    app.command(cls=Command)(command)
    return app


def _run(
    study: Any,
    facts: Mapping[str, Any],
    *,
    out: Annotated[Path, out_option("Folder for cells, tables and pictures.")],
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Run only these cells; * is any letters. Repeat for more.", rich_help_panel=_CELLS
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(help="Leave these cells out. Repeat for more.", rich_help_panel=_CELLS),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="Runs of each recipe, with seeds 0, 1, 2, ... Default: the study's.",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="How often an epoch uses the examples of a source, such as news=2. Repeat for "
            "more.",
            rich_help_panel=DATA,
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(
            help="Memory for activations in GB. Default: half of the free memory.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    keep_models: Annotated[
        bool,
        typer.Option(
            "--keep-models",
            help="Do not delete models after they were measured.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
) -> None:
    from tercet.studies.cells import run_study
    from tercet.studies.tables import write_results
    from tercet.training.recipe import Run

    if seeds is not None:
        study = replace(study, seeds=seeds)
    run = Run(dtype=dtype, device=device, memory_gb=memory_gb).resolved()
    cells = {"only": only or (), "without": without or ()}
    found = run_study(study, out, run, **cells, keep_models=keep_models, say=say)
    facts = {**facts, "seeds": study.seeds, "dtype": run.dtype}
    for table in write_results(out, found, study.report(found), facts):
        results().print(f"\n{table.title}")
        header, *rows = table.rows
        printed = columns(*header)
        for row in rows:
            printed.add_row(*row)
        results().print(printed)
    results().print(f"\n{out / 'table.md'}", soft_wrap=True)


def _function_of(file: Path) -> Callable[..., Any]:
    spec = spec_from_file_location(file.stem, file) if file.is_file() else None
    if spec is None or spec.loader is None:
        raise RecipeError(f"{file}: there is no such Python file; see examples/studies for some")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "study"):
        raise RecipeError(f"{file}: has no function study, which returns a Study; write one")
    return module.study


def _as_flag(parameter: inspect.Parameter) -> inspect.Parameter:
    """Return a parameter of typer for one such as ``steps: Annotated[int, "help"] = 1``."""
    kind, text, *_ = get_args(parameter.annotation)
    flag = Annotated[_FLAG_TYPES.get(kind, kind), typer.Option(help=text, rich_help_panel=_STUDY)]
    return parameter.replace(annotation=flag, kind=inspect.Parameter.KEYWORD_ONLY)


def _opened(parameter: inspect.Parameter, value: Any) -> Any:
    """Return the sources of files; other values as given."""
    kind, _, *formats = get_args(parameter.annotation)
    if kind not in _FLAG_TYPES or value is None:
        return value
    record_format = formats[0] if formats else EXAMPLE_FORMAT
    return [each for path in value for each in opened(path, record_format=record_format)]


def _weigh(values: dict[str, Any], weights: Mapping[str, float]) -> None:
    """Weigh the sources among some values by their names."""
    from tercet.data.batches.mixture import names_some, refuse_unknown, weighed

    lists = {name: value for name, value in values.items() if _are_sources(value)}
    refuse_unknown(list(weights), [source for some in lists.values() for source in some])
    for name, some in lists.items():
        values[name] = weighed(some, {n: w for n, w in weights.items() if names_some(n, some)}, {})


def _are_sources(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Source)


def _paths_in(flags: Mapping[str, Any]) -> list[Path]:
    """Return the files that flags name."""
    lists = [value if isinstance(value, list) else [value] for value in flags.values()]
    return [each for some in lists for each in some if isinstance(each, Path)]


def _is_path(value: Any) -> bool:
    some = value if isinstance(value, list) else [value]
    return any(isinstance(each, Path) for each in some)
