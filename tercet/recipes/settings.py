"""Settings of a recipe: their names, types and meanings, and the recipe that they make.

The parameters of a recipe function are its settings. Those of one stage begin with the stage's
name: ``unified_steps`` is written ``unified.steps``. The other numbers of a stage
(``tercet.training.recipe.Stage``) are settings of the same form, such as ``unified.warmup``, and
those of the machine (``tercet.training.recipe.Run``) begin with ``run``, such as
``run.save_minutes``. In a recipe with one stage, the name of the stage may be left out.
"""

import inspect
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tercet.errors import DataError, RecipeError
from tercet.files.records import meant
from tercet.recipes.catalog import RecipeEntry
from tercet.training.recipe import Recipe, Run, Stage

Built = TypeVar("Built")

RUN: Final = "run"
_OF_THIS_MACHINE: Final = ("device", "memory_gb", "show_progress")  # not taken from another run
_OF_EXAMPLES: Final = {  # numbers of a stage that mean nothing where it reads plain texts
    *("positives", "negatives", "in_batch", "mask_duplicates", "query_tokens", "document_tokens"),
    *("mixing", "length_edges", "token_budget", "batch_sizes", "batching"),
    *("shuffle_segments", "shuffle_at", "ignore_rule", "ignore_value", "ignore_own", "guide"),
}
_NONE: Final = "none"
_WORDS: Final = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One number or choice of a training."""

    name: str
    type: Any
    default: Any
    meaning: str
    unit: str = ""

    @property
    def part(self) -> str:
        """Name of the stage it belongs to; "run" for the machine, empty for the whole run."""
        return self.name.rpartition(".")[0]

    @property
    def full_meaning(self) -> str:
        """The meaning, with the choices that there are."""
        kinds, _ = _kinds(self.type)
        choices = [
            str(each) for kind in kinds if get_origin(kind) is Literal for each in get_args(kind)
        ]
        return f"{self.meaning} Choices: {', '.join(choices)}." if choices else self.meaning


@dataclass(frozen=True, slots=True)
class Training:
    """A recipe, and how it is run."""

    recipe: Recipe
    run: Run


def settings_of(entry: RecipeEntry) -> dict[str, Setting]:
    """Return all settings of a recipe by name: of the recipe, of each stage, of the machine."""
    parameters = inspect.signature(entry.function).parameters.values()
    found = [
        _setting(_dotted(each.name, entry), each.annotation, each.default) for each in parameters
    ]
    known = {setting.name for setting in found}
    stages = {stage.name: stage for stage in _all_stages(entry)}
    for name, stage in stages.items():
        prefix = "" if len(stages) == 1 else f"{name}."
        for field, kind in get_type_hints(Stage, include_extras=True).items():
            if hasattr(kind, "__metadata__") and prefix + field not in known:
                if entry.stages[name].format == "examples" or field not in _OF_EXAMPLES:
                    found.append(_setting(prefix + field, kind, getattr(stage, field)))
    defaults = {field.name: field.default for field in fields(Run)}
    for field, kind in get_type_hints(Run, include_extras=True).items():
        if hasattr(kind, "__metadata__"):
            found.append(_setting(f"{RUN}.{field}", kind, defaults[field]))
    return {setting.name: setting for setting in found}


def built(entry: RecipeEntry, given: Mapping[str, Any]) -> Training:
    """Return the recipe and the run that these settings make.

    Args:
        entry: the recipe, from ``tercet.recipes.catalog.RECIPES``.
        given: values by the names of ``settings_of``; others keep their defaults.

    Raises:
        RecipeError: if values do not fit together, or belong to a stage that does not run.
    """
    parameters = inspect.signature(entry.function).parameters
    of_recipe = {_dotted(name, entry): name for name in parameters}
    arguments = {of_recipe[name]: value for name, value in given.items() if name in of_recipe}
    run = {name.removeprefix(f"{RUN}."): value for name, value in given.items() if _is_run(name)}
    others = {n: v for n, v in given.items() if n not in of_recipe and not _is_run(n)}
    recipe = entry.function(**arguments)
    stages = {stage.name: stage for stage in recipe.stages}
    for name in given:
        stage = name.partition(".")[0]
        if stage in entry.stages and stage not in stages and "." in name:
            raise RecipeError(
                f"{name} is given, but the stage {stage} does not run (stages: "
                f"{', '.join(stages)}); remove it, or add the stage to stages"
            )
    fields_of: dict[str, dict[str, Any]] = {name: {} for name in stages}
    for name, value in others.items():
        stage, _, field = name.rpartition(".")
        fields_of[stage or next(iter(stages))][field] = value
    changed = replace(
        recipe,  # all settings of a stage at once, since some need each other
        stages=tuple(replace(stage, **fields_of[stage.name]) for stage in recipe.stages),
        settings={**recipe.settings, **others},
    )
    return Training(changed, Run(**run))


# ---- values from the command line and from files ---------------------------------------------


def from_words(entry: RecipeEntry, words: Iterable[str]) -> dict[str, Any]:
    """Return the values of words such as ``unified.negatives=7``, by the names of settings.

    Raises:
        RecipeError: if a name is unknown or given twice, or a value has another type; it says
            which names are near.
    """
    known, found = settings_of(entry), dict[str, Any]()
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise RecipeError(f"--set must be NAME=VALUE, as in --set seed=1; got {word!r}")
        setting = _named(name.strip(), known, entry)
        if setting.name in found:
            raise RecipeError(f"--set gives {setting.name} twice; remove one")
        found[setting.name] = _parsed(text.strip(), setting)
    return found


def checked(entry: RecipeEntry, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the names of settings, each in the type of its setting.

    Raises:
        RecipeError: if a name is unknown or a value has another type.
    """
    known = settings_of(entry)
    return {name: _checked(value, _named(name, known, entry)) for name, value in values.items()}


def from_file(entry: RecipeEntry, name: str, path: Path) -> dict[str, Any]:
    """Return the values in a TOML file, or in the ``recipe.json`` of an earlier run.

    Args:
        entry: the recipe that they are for.
        name: its name, which the file may repeat as ``recipe``.
        path: the file.

    Raises:
        DataError: if the file cannot be read.
        RecipeError: if it is of another recipe, or a name or a value in it is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
        of_run = path.suffix == ".json"
        values = json.loads(text) if of_run else tomllib.loads(text)
    except (OSError, ValueError) as error:  # also JSONDecodeError and TOMLDecodeError
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(path, None, f"cannot be read as settings: {reason}") from error
    if of_run:
        return _of_run(entry, name, path, values)
    if values.pop("recipe", name) != name:
        raise RecipeError(f"{path}: is for another recipe than {name}; give a file for {name}")
    known, found = settings_of(entry), dict[str, Any]()
    for key, value in _flat("", values):
        setting = _named(key, known, entry, where=f"{path}: ")
        found[setting.name] = _checked(value, setting, where=f"{path}: ")
    return found


def _of_run(entry: RecipeEntry, name: str, path: Path, values: Any) -> dict[str, Any]:
    """Return the settings of an earlier run, if they still make the recipe that it ran."""
    try:
        recorded = dict(values["recipe"])
        of, settings, run = recorded["name"], dict(recorded.pop("settings")), dict(values["run"])
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"{path}: holds no settings; give the recipe.json of a run that this version of tercet "
            "wrote"
        ) from error
    if of != name:
        raise RecipeError(f"{path}: is of a run of {of}; write: tercet train {of} --recipe {path}")
    known, found = settings_of(entry), dict[str, Any]()
    named = {_dotted(key, entry): value for key, value in settings.items()}
    named |= {f"{RUN}.{key}": v for key, v in run.items() if key not in _OF_THIS_MACHINE}
    for key, value in named.items():
        setting = known.get(key)
        if setting is None:
            raise RecipeError(f"{path}: {key!r} is no setting of {name} in this version of tercet")
        found[key] = _checked(value, setting, where=f"{path}: ")
    idle = {stage for stage in entry.stages if stage not in str(found.get("stages", stage))}
    found = {key: v for key, v in found.items() if key.partition(".")[0] not in idle}
    now = dict(_flat("", json.loads(json.dumps(asdict(built(entry, found).recipe), default=str))))
    was = dict(_flat("", recorded))
    if differ := [key for key in was if key in now and was[key] != now[key]]:
        raise RecipeError(
            f"{path}: these settings make another recipe now ({', '.join(differ[:3])} differ); it "
            "was changed in Python, or by another version of tercet"
        )
    return found


def _named(name: str, known: Mapping[str, Setting], entry: RecipeEntry, where: str = "") -> Setting:
    if len(entry.stages) == 1:
        name = name.removeprefix(f"{next(iter(entry.stages))}.")
    if name in known:
        return known[name]
    last = {each.rpartition(".")[2]: each for each in reversed(list(known))}
    hint = meant(name, known) or meant(last.get(name, ""), known)
    raise RecipeError(
        f"{where}there is no setting {name!r}{hint}; --explain lists all settings of this recipe"
    )


def _parsed(text: str, setting: Setting) -> Any:
    """Return the value that a text stands for."""
    kinds, optional = _kinds(setting.type)
    if optional and text.lower() == _NONE:
        return None
    for kind in kinds:
        if get_origin(kind) in (list, tuple):
            (each, *_) = get_args(kind)
            parts = [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
            of_part = replace(setting, type=each)
            try:
                return get_origin(kind)([_parsed(part, of_part) for part in parts])
            except RecipeError:
                raise _refused(text, setting) from None
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        if kind is str or (get_origin(kind) is Literal and text in get_args(kind)):
            return text
    raise _refused(text, setting)


def _checked(value: Any, setting: Setting, where: str = "") -> Any:
    """Return a value of a file in the type of its setting."""
    kinds, optional = _kinds(setting.type)
    if value is None and optional:
        return None
    for kind in kinds:
        origin = get_origin(kind)
        if origin in (list, tuple) and isinstance(value, list):
            (each, *_) = get_args(kind)
            return origin(_checked(part, replace(setting, type=each), where) for part in value)
        if origin is Literal and value in get_args(kind):
            return value
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(kind, type) and type(value) is kind:
            return value
    raise _refused(value, setting, where)


def _refused(value: Any, setting: Setting, where: str = "") -> RecipeError:
    kinds, optional = _kinds(setting.type)
    wanted: list[str] = []
    hint = ""
    for kind in kinds:
        if get_origin(kind) is Literal:
            wanted.append(f"one of {', '.join(map(str, get_args(kind)))}")
            hint = meant(str(value), list(map(str, get_args(kind))))
        elif get_origin(kind) in (list, tuple):
            of_part = _WORDS[get_args(kind)[0]].removeprefix("a ")
            wanted.append(f"a list of {of_part}s, as in 64,128")
        else:
            wanted.append(_WORDS[kind])
    wanted += [_NONE] * optional
    return RecipeError(f"{where}{setting.name} must be {' or '.join(wanted)}; got {value!r}{hint}")


# ---- names and types -------------------------------------------------------------------------


def _setting(name: str, annotation: Any, default: Any) -> Setting:
    kind, meaning, *unit = get_args(annotation)
    return Setting(name, kind, None if default is MISSING else default, meaning, *unit)


def _dotted(name: str, entry: RecipeEntry) -> str:
    """Return the name of a parameter as a setting: that of a stage has a dot after the stage."""
    stage, _, rest = name.partition("_")
    return f"{stage}.{rest}" if rest and stage in entry.stages else name


def _all_stages(entry: RecipeEntry) -> Sequence[Stage]:
    every = {"stages": ",".join(entry.stages)} if len(entry.stages) > 1 else {}
    return entry.function(**every).stages


def _kinds(kind: Any) -> tuple[list[Any], bool]:
    """Return the types that a union allows but None, and whether it allows None."""
    kinds = list(get_args(kind)) if get_origin(kind) in (Union, UnionType) else [kind]
    return [each for each in kinds if each is not NoneType], NoneType in kinds


def _is_run(name: str) -> bool:
    return name.startswith(f"{RUN}.")


def _flat(prefix: str, values: Any) -> Iterator[tuple[str, Any]]:
    """Yield nested values one by one, with dots in their names."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), value)
    else:
        yield prefix, values
