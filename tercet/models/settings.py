"""The settings that are saved beside a model's weights: prompts, pooling, lengths and more."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar, get_args

from tercet.errors import ModelError, RecipeError
from tercet.files.artifacts import read_json, write_json
from tercet.kinds import KINDS, Kind, Weights
from tercet.models.choices import Attention, DenseSettings, LayerSettings, PoolingName, Window
from tercet.models.texts import ROLES, role_of, surrogate_in
from tercet.models.tokens import Form
from tercet.rank.quantized import CodePrecision, Quantizer, Ranges
from tercet.types import Role

Rules: TypeAlias = Literal["tercet", "sentence_transformers", "llm2vec"]
"""A library whose rules a model follows where libraries differ.

- tercet: if the last token is pooled, an end-of-text token is added; the weights of a weighted mean
  count pooled tokens; an empty text whose prompt is not pooled is pooled over all its tokens.
- sentence_transformers: no token is added; the weights count a prompt that is not pooled, too; of
  an empty text the special tokens behind it are pooled.
- llm2vec: no token is added, since a template ends texts; otherwise as tercet.
"""

Layer = TypeVar("Layer", LayerSettings, DenseSettings)

VERSION: Final = 1
FILE: Final = "tercet.json"
_POOLINGS: Final = get_args(PoolingName)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How texts become vectors, apart from the weights; saved with the model."""

    pooling: PoolingName = "mean"
    normalize: bool = True  # vectors of unit length, so that a dot product is a cosine
    prompts: Mapping[str, str] = field(default_factory=dict)  # role or name -> put before a text
    default_prompt: str | None = None  # name of the prompt of roles that have none
    task_prompts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # task -> the same
    layer: LayerSettings | None = None  # trained, between token states and pooling
    dense_layers: tuple[DenseSettings, ...] = ()  # trained, after the pooling, in order
    append_end: bool = False  # the end-of-text token after every text, part of the vector
    suffixes: Mapping[str, str] = field(default_factory=dict)  # role -> what is put after a text
    pool_prompt: bool = True  # false: a prompt is read, but not part of the vector
    pool_suffix: bool = False  # true: a suffix is part of the vector
    pool_special: bool = True  # false: the tokenizer's special tokens are not part of the vector
    echo: bool = False  # each text twice, and only the second copy part of the vector
    rules: Rules = "tercet"  # whose rules apply where those of libraries differ
    on_empty: Literal["all", "error"] = "all"  # pool all tokens of an empty text, or refuse it
    query_tokens: int = 512  # a longer text is cut
    document_tokens: int = 512
    dims: tuple[int, ...] = ()  # shorter widths that were trained to work alone (Matryoshka)
    kinds: tuple[Kind, ...] = ("dense",)  # of vectors that the model was trained for
    multi_dim: int | None = None  # width of token vectors; None: that of the states
    cls_every: int | None = None  # repeat the start token every n tokens and average them (MCLS)
    weights: Mapping[str, Weights] = field(default_factory=dict)  # task -> of kinds; "": default
    ranges: Mapping[int, Ranges] = field(default_factory=dict)  # coordinates kept -> of their codes
    shares_space_with: tuple[str, ...] = ()  # fingerprints of the model that it was distilled from
    distilled_as: tuple[str, ...] = ()  # its own when distilled; once changed, it shares no space

    def prompt(self, name: str, task: str | None = None) -> str:
        """Return what is put before a text of this role, which may be a synonym.

        That is the prompt of the role. One that has none gets the default prompt, unless that is
        the other role's; the role "default" always gets it. ``task`` may be a task, or the name of
        any prompt.

        Raises:
            RecipeError: for an unknown role, or if the model has no prompts for the task.
        """
        role, default = role_of(name), self.default_prompt
        if task is None:
            if default is not None and (name == "default" or default not in ROLES):
                usual = self.prompts[default]
                return usual if name == "default" else self.prompts.get(role, usual)
            return self.prompts.get(role, "")
        if task in self.task_prompts:
            return self.task_prompts[task].get(role, "")
        if task not in self.prompts:
            known = ", ".join(sorted({*self.task_prompts, *self.prompts})) or "none"
            raise RecipeError(f"the model has no prompt for the task {task!r}; it knows: {known}")
        return self.prompts[task]

    def form(self, role: Role) -> Form:
        """Return what else is put around a text of this role, and which of it is pooled."""
        return Form(
            pool_prompt=self.pool_prompt,
            suffix=self.suffixes.get(role, ""),
            pool_suffix=self.pool_suffix,
            pool_special=self.pool_special,
            end=self.ends,
            pool_end=self.rules == "sentence_transformers",
            echo=role if self.echo else None,
            cls_every=self.cls_every,
        )

    @property
    def ends(self) -> bool:
        """Whether the end-of-text token stands after every text.

        A network that was not trained to embed gets one if its last token is pooled. A model of
        another library keeps its tokenizer, which ends texts as in training.
        """
        return self.append_end or (self.pooling == "last" and self.rules == "tercet")

    def max_tokens(self, role: Role) -> int:
        """Return the longest text of this role in tokens, special ones and prompt included."""
        return self.query_tokens if role == "query" else self.document_tokens

    def inexpressible(self) -> str | None:
        """Return a setting in use that sentence-transformers cannot express, in words."""
        used = {
            "a suffix after texts": any(self.suffixes.values()),
            "special tokens that are not pooled": not self.pool_special,
            "echo": self.echo,
            "start tokens inside of texts": self.cls_every is not None,
            "a weighted mean that counts tokens after the prompt": (
                self.pooling == "weighted_mean"
                and self.layer is None
                and self.rules != "sentence_transformers"
                and not self.pool_prompt
                and any(prompt for _, prompt in named_prompts(self))
            ),
        }
        return next((what for what, is_used in used.items() if is_used), None)


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Return the settings with some replaced.

    Raises:
        RecipeError: for a setting that does not exist, or a value of the wrong type.
    """
    known = {f.name for f in fields(Settings)}
    unknown = set(changes) - known
    if unknown:
        raise RecipeError(f"no such setting: {', '.join(sorted(unknown))}; known: {sorted(known)}")
    given = dict(changes)
    for name in ("dims", "kinds", "dense_layers", "shares_space_with", "distilled_as"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    if isinstance(given.get("layer"), Mapping):
        given["layer"] = _layer_of("layer", LayerSettings, given["layer"])
    if isinstance(given.get("dense_layers"), tuple):
        given["dense_layers"] = tuple(
            _layer_of("dense_layers", DenseSettings, each) if isinstance(each, Mapping) else each
            for each in given["dense_layers"]
        )
    if isinstance(given.get("weights"), Mapping):
        given["weights"] = {task: _weights_of(each) for task, each in given["weights"].items()}
    if isinstance(given.get("ranges"), Mapping):
        given["ranges"] = dict(map(_ranges_of, given["ranges"].items()))
    for name, value in given.items():
        _check(name, value)
    return _consistent(replace(settings, **given), default_given="default_prompt" in given)


def _consistent(found: Settings, *, default_given: bool) -> Settings:
    """Return the settings if they fit each other; new prompts may lack the old default one."""
    if found.cls_every is not None and found.pooling != "first":
        raise RecipeError(
            f'cls_every averages start tokens, so pooling must be "first"; got "{found.pooling}"; '
            "set it, or leave cls_every out"
        )
    if found.cls_every is not None and not found.pool_prompt:
        raise RecipeError(
            "cls_every averages the start tokens of prompts as well, so pool_prompt must be true; "
            "set it, or leave cls_every out"
        )
    if found.default_prompt is None or found.default_prompt in found.prompts:
        return found
    if default_given:
        known = ", ".join(found.prompts) or "nothing, as there are no prompts"
        raise RecipeError(
            f'the setting default_prompt must be one of {known}; got "{found.default_prompt}"'
        )
    return replace(found, default_prompt=None)


def with_roles(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return changes of a user, whose prompts and suffixes must be for roles, or synonyms of them.

    Those in a model's files may have any name.

    Raises:
        RecipeError: for a name that is neither a role nor a synonym, nor the default prompt.
    """
    default = changes.get("default_prompt")
    for setting in ("prompts", "suffixes"):
        for name in changes.get(setting) or ():
            if name not in ROLES and name != default:
                raise RecipeError(f'{setting} must be for "query" or "document"; got {name!r}')
    found = {name: _by_role(name, value) for name, value in changes.items()}
    return {**found, "default_prompt": ROLES.get(default, default)} if default else found


def _by_role(setting: str, value: Any) -> Any:
    """Return prompts and suffixes under the names of roles instead of their synonyms."""
    if not isinstance(value, Mapping):
        return value
    if setting == "task_prompts":
        return {task: _by_role("prompts", each) for task, each in value.items()}
    if setting not in ("prompts", "suffixes"):
        return value
    found = dict(value)
    for name in value:
        role = ROLES.get(name, name)
        if role != name and not found.get(role):
            found[role] = found.pop(name)
    return found


def _check(name: str, value: Any) -> None:
    """Raise if a value has the wrong type, such as one from a file edited by hand."""
    fits, expected = _EXPECTED.get(name, (lambda it: isinstance(it, bool), "true or false"))
    if not fits(value):
        raise RecipeError(f"the setting {name} must be {expected}; got {value!r}")


def _layer_of(name: str, kind: type[Layer], record: Mapping[str, Any]) -> Layer:
    try:
        return kind(**record)
    except TypeError as error:
        raise RecipeError(f"the setting {name} cannot be {dict(record)}; {error}") from error


def _weights_of(record: Any) -> Any:
    if not isinstance(record, Mapping):
        return record
    try:
        found = Weights(**{kind: float(weight) for kind, weight in record.items()})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the setting weights cannot have {dict(record)}; {error}") from error
    each = [found.of(kind) for kind in KINDS]
    if not all(0 <= weight < inf for weight in each) or not any(each):
        raise RecipeError(
            "the setting weights must have numbers from 0, at least one of them above 0; got "
            f"{dict(record)}"
        )
    return found


def _ranges_of(pair: tuple[Any, Any]) -> tuple[int, Ranges]:
    """Return a number of coordinates, which JSON has as a string, and the ranges of their codes."""
    dims, record = pair
    if isinstance(record, Ranges):
        return dims, record
    try:
        found = Ranges.read(record)
        if len(found.centre) != int(dims):
            raise ValueError(f"its centre has {len(found.centre)} numbers")
    except ValueError as error:
        raise RecipeError(
            f"the setting ranges is damaged for {dims} coordinates ({error}); learn them again: "
            "tercet tune codes"
        ) from error
    return int(dims), found


def _are_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(text, str) and surrogate_in(text) is None
        for pair in value.items()
        for text in pair
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, str) for each in value)


def _are_kinds(value: Any) -> bool:
    if not isinstance(value, tuple):
        return False
    return set(value) <= set(KINDS) and 0 < len(value) == len(set(value))


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(fits, value.values()))


_EXPECTED: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "rules": (lambda it: it in get_args(Rules), f"one of {', '.join(get_args(Rules))}"),
    "default_prompt": (lambda it: it is None or isinstance(it, str), "the name of a prompt"),
    "pooling": (lambda it: it in _POOLINGS, f"one of {', '.join(_POOLINGS)}"),
    "on_empty": (lambda it: it in ("all", "error"), "all or error"),
    "prompts": (_are_texts, "texts by role, in valid Unicode"),
    "suffixes": (_are_texts, "texts by role, in valid Unicode"),
    "task_prompts": (_by_name(_are_texts), "texts by task and role, in valid Unicode"),
    "layer": (lambda it: it is None or isinstance(it, LayerSettings), "a layer or null"),
    "dense_layers": (
        lambda it: isinstance(it, tuple) and all(isinstance(each, DenseSettings) for each in it),
        "a list of dense layers",
    ),
    "dims": (lambda it: isinstance(it, tuple) and all(map(_is_count, it)), "a list of widths"),
    "kinds": (_are_kinds, f"a list of kinds of vectors, from {', '.join(KINDS)}"),
    "weights": (_by_name(lambda it: isinstance(it, Weights)), "weights of the kinds by task"),
    "ranges": (lambda it: isinstance(it, Mapping), "ranges of codes by number of coordinates"),
    "shares_space_with": (_are_names, "a list of fingerprints"),
    "distilled_as": (_are_names, "a list of fingerprints"),
    "query_tokens": (_is_count, "a whole number above 0"),
    "document_tokens": (_is_count, "a whole number above 0"),
    "multi_dim": (lambda it: it is None or _is_count(it), "a whole number above 0, or null"),
    "cls_every": (lambda it: it is None or _is_count(it), "a whole number above 0, or null"),
}


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the content of ``tercet.json``, its ``settings`` checked; None if it is missing.

    Raises:
        ModelError: if it is damaged, or written by a newer tercet; or if the folder holds an
            adapter without it.
    """
    path = folder / FILE
    if not path.exists():
        # A folder of sentence-transformers reads as its base does.
        if (folder / "adapter_config.json").exists() and not (folder / "modules.json").exists():
            raise ModelError(
                f"{folder}: holds an adapter without {FILE}, so the direction of its attention is "
                "unknown; save it with save_adapter, or merge it into its base first (tercet merge)"
            )
        return None
    try:
        saved = read_json(path)
        version = int(saved["version"])
        attention, window, settings = saved["attention"], saved["window"], saved["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: not a tercet settings file ({error}); save the model again"
        ) from error
    if version > VERSION:
        raise ModelError(f"{path}: written by a newer tercet (format {version}); upgrade tercet")
    for name, value, choices in (("attention", attention, Attention), ("window", window, Window)):
        if value not in get_args(choices):
            known = ", ".join(get_args(choices))
            raise ModelError(f"{path}: {name} must be one of {known}; got {value!r}")
    if not isinstance(saved.get("adapter_of", ""), str) or not isinstance(settings, dict):
        raise ModelError(f"{path}: adapter_of must be a text, and settings an object")
    try:
        return {**saved, "settings": changed(Settings(), settings)}
    except RecipeError as error:
        raise ModelError(f"{path}: {error}; correct it, or save the model again") from error


def named_prompts(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield prompts by role, and those of tasks as ``sections-query``, which is mteb's format.

    Empty ones are left out, except where a default prompt would take their place.
    """
    for role, prompt in settings.prompts.items():
        if prompt or settings.default_prompt:
            yield role, prompt
    for task, prompts in settings.task_prompts.items():
        for role, prompt in prompts.items():
            if prompt:
                yield f"{task}-{role}", prompt


def as_prompt(instruction: str) -> str:
    r"""Return the prompt of an instruction, ``Instruct: {instruction}\nQuery: ``; "" of "".

    arXiv 2405.17428, section 3.3. The paper prints two spaces where the published models have a
    line break; the line break is used.
    """
    instruction = instruction.strip()
    return f"Instruct: {instruction}\nQuery: " if instruction else ""


# ---- settings that are added to a saved model --------------------------------------------------


def require_settings(folder: Path | str, what: str = "weights") -> None:
    """Raise if ``what`` cannot be added to a folder's settings.

    Raises:
        ModelError: if the folder has no ``tercet.json``, or a damaged one.
    """
    if not Path(folder).is_dir() or read_settings(Path(folder)) is None:
        raise ModelError(
            f"{folder}: has no {FILE}, so {what} cannot be kept there; save the model with tercet "
            "first: Embedder.load(...).save(folder)"
        )


def keep(folder: Path | str, setting: str, values: Mapping[str, Any]) -> None:
    """Add to a setting that maps names to values; nothing else in the folder changes.

    Raises:
        StorageError: if the disk refuses.
    """
    path = Path(folder) / FILE
    record = read_json(path)
    record["settings"].setdefault(setting, {}).update(values)
    write_json(path, record)


def save_ranges(folder: Path | str, found: Mapping[int, Ranges]) -> None:
    """Add the ranges of codes for some numbers of coordinates to a saved model.

    Vectors and the files of sentence-transformers stay the same.

    Raises:
        ModelError: if the folder has no ``tercet.json``, or a damaged one.
        StorageError: if the disk refuses.
    """
    require_settings(folder, "ranges of codes")
    keep(folder, "ranges", {str(dims): asdict(each) for dims, each in found.items()})


def quantizer_of(settings: Settings, precision: CodePrecision, dims: int) -> Quantizer:
    """Return the quantizer of a model's vectors with ``dims`` coordinates.

    Raises:
        RecipeError: if the model has no ranges for them.
    """
    if dims not in settings.ranges:
        known = ", ".join(map(str, sorted(settings.ranges))) or "none"
        raise RecipeError(
            f"the model keeps no ranges for {precision} codes of {dims} coordinates (it has some "
            f"for: {known}); learn them from documents: tercet tune codes texts.jsonl "
            f"--model MODEL --dims {dims} --save"
        )
    return settings.ranges[dims].quantizer(precision)
