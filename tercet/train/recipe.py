"""What a recipe is made of. A recipe holds no code that runs: it only says what to run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, get_args

from tercet.data.collate import Policy
from tercet.data.sampler import Mixing
from tercet.errors import RecipeError
from tercet.nn.backbone import Attention, Window
from tercet.nn.layer import Layer
from tercet.nn.pooling import PoolingName
from tercet.objectives.objective import Objective
from tercet.train.schedule import ScheduleName


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train low-rank updates of the linear layers and freeze everything else; peft applies it."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05

    def __post_init__(self) -> None:
        at_least(1, self, "rank", "alpha")
        shares(self, "dropout")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which network, and how its hidden states become vectors. None: as the model says itself."""

    base: str  # a zoo name, a local folder, or a name on the hub
    pooling: PoolingName | None = None
    attention: Attention | None = None
    window: Window | None = None
    layer: Layer | Literal["none"] | None = None  # trained, between states and pooling
    keep_layers: int | None = None  # of the network, the first ones; None: all
    lora: Lora | None = None  # None: every weight is trained
    freeze_embeddings: bool = False  # leave the token table as it is
    prompts: Mapping[str, str] | None = None  # role -> what is put before its texts
    pool_prompt: bool | None = None
    append_end: bool | None = None  # the end-of-text token after every text
    query_tokens: int | None = None  # a longer text is cut
    document_tokens: int | None = None

    def __post_init__(self) -> None:
        at_least(4, self, "query_tokens", "document_tokens")  # two may be special tokens
        at_least(1, self, "keep_layers")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One uninterrupted run of one objective over one mixture of data."""

    name: str
    objective: Objective
    data: str = "pairs"  # which of the run's mixtures it reads, where there are several
    keep: Literal["best", "last"] = "best"  # the weights that stay, where a dev set is measured
    epochs: float = 1.0
    steps: int | None = None  # overrides epochs
    batch_size: int = 64  # examples of one optimizer step, over all processes
    positives: int = 1  # of one query in a batch, at most
    negatives: int = 8  # mined ones of one query, at most
    in_batch: Policy = "per_row"  # which documents of other examples are negatives
    mask_duplicates: bool = True  # never take a text that answers the query too for a negative
    mixing: Mixing = "single"  # one source a batch, or all in each
    length_edges: tuple[int, ...] = ()  # borders of length groups, in tokens; a batch has one group
    token_budget: int | None = None  # examples times tokens of their group's longest text, at most
    learning_rate: float = 2e-5  # at the peak
    schedule: ScheduleName = "linear"
    warmup: float = 0.1  # share of the steps
    warmup_steps: int | None = None  # overrides warmup
    decay: float = 0.1  # share of the steps; of the warmup-stable-decay schedule only
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    patience: int | None = None  # evaluations without a better result until it stops

    def __post_init__(self) -> None:
        for name, choices in (("in_batch", Policy), ("mixing", Mixing)):
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise RecipeError(f"{name} is {getattr(self, name)!r}; choose from {known}")
        above(0, self, "epochs", "learning_rate", "clip")
        at_least(1, self, "steps", "positives", "token_budget", "patience")
        at_least(0, self, "negatives", "weight_decay", "warmup_steps")
        shares(self, "warmup", "decay")
        edges = self.length_edges
        if list(edges) != sorted(set(edges)) or min(edges, default=1) < 1:
            raise RecipeError(
                f"length_edges are {edges}; give lengths above 0, each once, the smallest first"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages run in order, each starting from the weights the one before it left."""

    name: str
    model: Model
    stages: tuple[Stage, ...]
    seed: int = 0
    paper: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)  # where we depart from it, and why


def chosen(stages: Mapping[str, Stage], names: str) -> tuple[Stage, ...]:
    """The stages of these names, with commas between, in the order given.

    Raises:
        RecipeError: when a name is unknown or given twice, or there is none.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted or set(wanted) - set(stages) or len(set(wanted)) < len(wanted):
        raise RecipeError(f"stages are {names!r}; choose from {', '.join(stages)}, each once")
    return tuple(stages[name] for name in wanted)


def above(limit: int, record: object, *fields: str) -> None:
    """Refuse numbers that are not above ``limit``; None is no number."""
    for name, value in _numbers(record, fields):
        if not (value > limit and isfinite(value)):
            raise RecipeError(f"{name} is {value}; give a number above {limit}")


def at_least(limit: int, record: object, *fields: str) -> None:
    """Refuse numbers below ``limit``; None is no number."""
    for name, value in _numbers(record, fields):
        if not (value >= limit and isfinite(value)):
            raise RecipeError(f"{name} is {value}; give {limit} or more")


def shares(record: object, *fields: str) -> None:
    """Refuse numbers that are no share of a whole."""
    for name, value in _numbers(record, fields):
        if not 0 <= value <= 1:
            raise RecipeError(f"{name} is {value}; give a share, from 0 to 1")


def _numbers(record: object, fields: tuple[str, ...]) -> list[tuple[str, float | int]]:
    values = [(name, getattr(record, name)) for name in fields]
    return [(name, value) for name, value in values if value is not None]
