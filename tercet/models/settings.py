"""How texts become vectors, apart from the weights: what is saved beside them."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf
from pathlib import Path
from typing import Any, Final, Literal, get_args

from tercet.errors import ModelError, RecipeError
from tercet.kinds import KINDS, Kind, Weights
from tercet.models.network.backbone import Attention, Window
from tercet.models.network.latent_attention import Layer
from tercet.models.network.pooling import POOLINGS, PoolingName
from tercet.models.tokens import Form
from tercet.rank.quantized import Ranges
from tercet.types import Role

VERSION: Final = 1
FILE: Final = "tercet.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How texts become vectors, apart from the weights. Saved with the model."""

    pooling: PoolingName = "mean"
    normalize: bool = True  # vectors of unit length, so that a dot product is a cosine
    prompts: Mapping[str, str] = field(default_factory=dict)  # role -> what is put before a text
    task_prompts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # task -> the same
    layer: Layer | None = None  # trained, between the states of the tokens and their pooling
    append_end: bool = False  # the end-of-text token after every text, part of the vector
    suffixes: Mapping[str, str] = field(default_factory=dict)  # role -> what is put after a text
    pool_prompt: bool = True  # false: a prompt is read, but not part of the vector
    pool_suffix: bool = False  # true: a suffix is part of the vector
    pool_special: bool = True  # false: nor is what the tokenizer puts around a text by itself
    echo: bool = False  # each text twice, and only the second time part of the vector
    on_empty: Literal["all", "error"] = "all"  # encode a text of nothing by all tokens, or refuse
    query_tokens: int = 512  # a longer text is cut
    document_tokens: int = 512
    dims: tuple[int, ...] = ()  # shorter widths that were trained to work alone (Matryoshka)
    kinds: tuple[Kind, ...] = ("dense",)  # of vectors that the model was trained for
    multi_dim: int | None = None  # width of a token's vector; None: of the model's states
    cls_every: int | None = None  # the start token before every so many tokens; their mean (MCLS)
    weights: Mapping[str, Weights] = field(default_factory=dict)  # task -> of the kinds; "": usual
    ranges: Mapping[int, Ranges] = field(default_factory=dict)  # coordinates kept -> of their codes

    def prompt(self, role: Role, task: str | None = None) -> str:
        """What is put before a text of this role.

        Raises:
            RecipeError: for a task that the model has no prompts for.
        """
        if task is None:
            return self.prompts.get(role, "")
        if task not in self.task_prompts:
            known = ", ".join(sorted(self.task_prompts)) or "none"
            raise RecipeError(f"the model has no prompt for the task {task!r}; it knows: {known}")
        return self.task_prompts[task].get(role, "")

    def form(self, role: Role) -> Form:
        """What else is put around a text of this role, and which of it is pooled."""
        return Form(
            pool_prompt=self.pool_prompt,
            suffix=self.suffixes.get(role, ""),
            pool_suffix=self.pool_suffix,
            pool_special=self.pool_special,
            end=self.ends,
            echo=role if self.echo else None,
            cls_every=self.cls_every,
        )

    @property
    def ends(self) -> bool:
        """Whether the end-of-text token stands after every text."""
        return self.append_end or self.pooling == "last"

    def max_tokens(self, role: Role) -> int:
        """The length at which texts of this role are cut, special tokens and prompt included."""
        return self.query_tokens if role == "query" else self.document_tokens

    def only_ours(self) -> str | None:
        """What sentence-transformers' files have no words for, where these settings use it."""
        used = {
            "a suffix after texts": any(self.suffixes.values()),
            "special tokens that are not pooled": not self.pool_special,
            "echo": self.echo,
            "start tokens inside of texts": self.cls_every is not None,
        }
        return next((what for what, is_used in used.items() if is_used), None)


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with some replaced.

    Raises:
        RecipeError: for a setting that does not exist, or a value of the wrong kind.
    """
    known = {f.name for f in fields(Settings)}
    unknown = set(changes) - known
    if unknown:
        raise RecipeError(f"no such setting: {', '.join(sorted(unknown))}; known: {sorted(known)}")
    given = dict(changes)
    for name in ("dims", "kinds"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    if isinstance(given.get("layer"), Mapping):
        given["layer"] = _layer_of(given["layer"])
    if isinstance(given.get("weights"), Mapping):
        given["weights"] = {task: _weights_of(each) for task, each in given["weights"].items()}
    if isinstance(given.get("ranges"), Mapping):
        given["ranges"] = dict(map(_ranges_of, given["ranges"].items()))
    for name, value in given.items():
        _check(name, value)
    found = replace(settings, **given)
    if found.cls_every is not None and found.pooling != "first":
        raise RecipeError(
            f"cls_every makes the vector of start tokens, and the pooling is {found.pooling}; set "
            'pooling to "first" as well, or leave cls_every out'
        )
    if found.cls_every is not None and not found.pool_prompt:
        raise RecipeError(
            "cls_every makes the vector of start tokens, of prompts as of texts; set pool_prompt "
            "to true, or leave cls_every out"
        )
    return found


def _check(name: str, value: Any) -> None:
    """Refuse a value that does not fit, such as one from a file edited by hand."""
    fits, wanted = _WANTED.get(name, (lambda it: isinstance(it, bool), "true or false"))
    if not fits(value):
        if name in ("pooling", "on_empty"):
            raise RecipeError(f"no such {name}: {value}; choose from {wanted}")
        raise RecipeError(f"the setting {name} is {value!r}; it should be {wanted}")


def _layer_of(record: Mapping[str, Any]) -> Layer:
    try:
        return Layer(**record)
    except TypeError as error:
        raise RecipeError(f"the setting layer is {dict(record)}; {error}") from error


def _weights_of(record: Any) -> Any:
    if not isinstance(record, Mapping):
        return record
    try:
        found = Weights(**{kind: float(weight) for kind, weight in record.items()})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the setting weights has {dict(record)}; {error}") from error
    each = [found.of(kind) for kind in KINDS]
    if not all(0 <= weight < inf for weight in each) or not any(each):
        raise RecipeError(
            f"the setting weights has {dict(record)}; give numbers from 0, one of them above"
        )
    return found


def _ranges_of(pair: tuple[Any, Any]) -> tuple[int, Ranges]:
    """A number of coordinates, which JSON has as a text, and the ranges of their codes."""
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
            "tercet calibrate"
        ) from error
    return int(dims), found


def _is_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(text, str) for pair in value.items() for text in pair
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_count_or_nothing(value: Any) -> bool:
    return value is None or _is_count(value)


def _are_kinds(value: Any) -> bool:
    if not isinstance(value, tuple):
        return False
    return set(value) <= set(KINDS) and 0 < len(value) == len(set(value))


def _by_name(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(fits, value.values()))


_WANTED: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "pooling": (lambda it: it in tuple(POOLINGS), ", ".join(POOLINGS)),
    "on_empty": (lambda it: it in ("all", "error"), "all, error"),
    "prompts": (_is_texts, "texts by role"),
    "suffixes": (_is_texts, "texts by role"),
    "task_prompts": (_by_name(_is_texts), "texts by task and role"),
    "layer": (lambda it: it is None or isinstance(it, Layer), "a layer or nothing"),
    "dims": (lambda it: isinstance(it, tuple) and all(map(_is_count, it)), "a list of widths"),
    "kinds": (_are_kinds, f"a list of kinds of vectors, of {', '.join(KINDS)}"),
    "weights": (_by_name(lambda it: isinstance(it, Weights)), "weights of the kinds by task"),
    "ranges": (lambda it: isinstance(it, Mapping), "ranges of codes by number of coordinates"),
    "query_tokens": (_is_count, "a whole number above 0"),
    "document_tokens": (_is_count, "a whole number above 0"),
    "multi_dim": (_is_count_or_nothing, "a whole number above 0, or nothing"),
    "cls_every": (_is_count_or_nothing, "a whole number above 0, or nothing"),
}


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The record that a saved model carries, its ``settings`` checked; None where there is none.

    Raises:
        ModelError: where it is damaged, or of a newer tercet; or where the folder holds an adapter
            that nobody says how to read.
    """
    path = folder / FILE
    if not path.exists():
        if (folder / "adapter_config.json").exists():
            raise ModelError(
                f"{folder}: holds an adapter without {FILE}, so nothing says which way its model "
                "reads; save it with save_adapter, or merge it into its base first (tercet merge)"
            )
        return None
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        version = int(saved["version"])
        attention, window, settings = saved["attention"], saved["window"], saved["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: not a tercet settings file ({error}); save the model again"
        ) from error
    if version > VERSION:
        raise ModelError(f"{path}: written by a newer tercet (format {version}); upgrade tercet")
    for name, value, choices in (("attention", attention, Attention), ("window", window, Window)):
        if value not in get_args(choices):
            known = ", ".join(get_args(choices))
            raise ModelError(f"{path}: no such {name}: {value!r}; choose from {known}")
    if not isinstance(saved.get("adapter_of", ""), str) or not isinstance(settings, dict):
        raise ModelError(f"{path}: adapter_of should be a text, and settings an object")
    try:
        return {**saved, "settings": changed(Settings(), settings)}
    except RecipeError as error:
        raise ModelError(f"{path}: {error}; mend it, or save the model again") from error


def named_prompts(settings: Settings) -> Iterator[tuple[str, str]]:
    """Prompts by role, and those of tasks by names such as ``sections-query``, as mteb has them."""
    for role, prompt in settings.prompts.items():
        if prompt:
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
