"""A recipe: which model, which stages, which numbers. It holds no code that runs.

``Run`` holds what depends on the machine instead: it changes time and memory only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

import torch

from tercet import distributed
from tercet.curate.mining.miner import Mining
from tercet.curate.mining.rules import MiningRule
from tercet.data.batches.false_negatives import IgnoreRule, IgnoreRuleName
from tercet.data.batches.shuffling import CutName
from tercet.errors import RecipeError
from tercet.kinds import Kind
from tercet.models.choices import Attention, LayerSettings, PoolingName, WhichLayers, Window
from tercet.models.devices import NumberType, find_device, number_type
from tercet.objectives.objective import Objective
from tercet.types import Mixing, Policy, ScheduleName

Batching: TypeAlias = Literal["fit", "bge-m3-pairs-80gb", "bge-m3-finetune-80gb"]
"""Where batch sizes come from: this machine's memory, or the paper's table for 80 GB devices."""


LEAST: Final = 2  # examples of a batch: with one there is nothing to contrast


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
    """The network, and how its states become vectors. None: what the model's folder says."""

    base: str  # a zoo name, a local folder, or a name on the hub
    pooling: PoolingName | None = None
    attention: Attention | None = None
    window: Window | None = None
    layer: LayerSettings | Literal["none"] | None = None  # trained, between states and pooling
    keep_layers: int | None = None  # number of layers of the network; None: all
    which_layers: WhichLayers = "first"
    lora: Lora | None = None  # None: every weight is trained
    freeze_embeddings: bool = False  # do not train the token table
    prompts: Mapping[str, str] | None = None  # role -> what is put before its texts
    pool_prompt: bool | None = None
    append_end: bool | None = None  # the end-of-text token after every text
    query_tokens: int | None = None  # a longer text is cut
    document_tokens: int | None = None
    kinds: tuple[Kind, ...] | None = None  # of vectors that it makes; missing heads are created
    multi_dim: int | None = None  # width of a token's vector
    dense_dim: int | None = None  # width of a text's vector; another one adds a dense layer
    as_wide_as: str | None = None  # a model whose width that is
    cls_every: int | None = None  # repeat the start token after this many tokens
    freeze_backbone: bool = False  # train the heads and other new layers alone
    positions: int | None = None  # extend the position table for longer texts; train on such texts

    def __post_init__(self) -> None:
        at_least(4, self, "query_tokens", "document_tokens")  # two may be special tokens
        at_least(1, self, "keep_layers", "multi_dim", "dense_dim", "cls_every", "positions")
        if self.dense_dim is not None and self.as_wide_as is not None:
            raise RecipeError(
                f"dense_dim is {self.dense_dim}, and as_wide_as takes the width of "
                f"{self.as_wide_as}; remove one of them"
            )
        if self.lora is not None and (self.freeze_backbone or self.positions is not None):
            what = "a frozen backbone" if self.freeze_backbone else "a longer table of positions"
            raise RecipeError(f"{what} and LoRA do not go together; remove one of them")


RANKS_10_TO_210: Final = Mining(
    rule=MiningRule(kind="naive", shift=10, sample_from=200), negatives=15, depth=220
)
"""FlagEmbedding's way of mining: some of ranks 10 to 210, whatever their scores."""


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """Hard negatives mined again by the model in training (ANCE, arXiv 2007.00808).

    They are mined from the documents of all the stage's examples, and replace the negatives there
    unless ``mining.keep`` is set. ``Stage.negatives`` of them are drawn for a batch.
    """

    every: int | None  # optimizer steps; None: only at the start
    at_start: bool = False  # before the first step too
    missing: bool = False  # only if no example of some source has any
    mining: Mining = RANKS_10_TO_210
    corpus: tuple[str, ...] = ()  # files of further documents to mine from

    def __post_init__(self) -> None:
        at_least(1, self, "every")
        if self.every is None and not self.at_start:
            raise RecipeError("a refresh is neither at the start nor later; remove it")
        if self.mining.at_least:
            raise RecipeError(
                f"a refresh has at_least {self.mining.at_least}, but leaves out no row; give 0"
            )
        if self.mining.by == "bm25":
            raise RecipeError(
                "a refresh by bm25 finds the same each time, since no model learns it; mine once "
                "with tercet mine, or refresh by the model's own scores"
            )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One uninterrupted run of one objective over one mixture of data."""

    name: str
    objective: Objective
    data: str = "pairs"  # which of the run's mixtures it reads
    keep: Annotated[
        Literal["best", "last"], "Which weights stay, if there is a dev set: the best or the last."
    ] = "best"
    epochs: Annotated[float, "Passes over the data.", "epochs"] = 1.0
    steps: Annotated[int | None, "Optimizer steps; overrides epochs.", "steps"] = None
    batch_size: Annotated[int, "Examples in a step, over all processes.", "examples"] = 64
    positives: Annotated[int, "Maximum number of positives of a query in a batch.", "documents"] = 1
    negatives: Annotated[int, "Maximum number of mined negatives of a query.", "documents"] = 8
    in_batch: Annotated[
        Policy,
        "Which documents of other examples are negatives; per_row: all, unless the task of a row "
        "forbids it.",
    ] = "per_row"
    mask_duplicates: Annotated[
        bool, "Never take a document that equals a positive as a negative."
    ] = True
    ignore_rule: Annotated[
        IgnoreRuleName | None,
        "Ignore documents of other examples that likely answer the query too: those that score "
        "above its positive's score plus ignore_value (margin), or above that share of it "
        "(percent).",
    ] = None
    ignore_value: Annotated[float | None, "Value of ignore_rule. Default: 0.1; percent 0.95."] = (
        None
    )
    guide: Annotated[
        str | None,
        "Model whose scores ignore_rule compares; it encodes all texts before the training. "
        "Default: the model in training.",
    ] = None
    ignore_own: Annotated[bool, "Ignore mined negatives of the query by ignore_rule too."] = False
    query_tokens: Annotated[
        int | None, "Longer queries are cut in this stage. Default: the model's limit.", "tokens"
    ] = None
    document_tokens: Annotated[
        int | None, "Longer documents are cut in this stage. Default: the model's limit.", "tokens"
    ] = None
    mixing: Annotated[Mixing, "A batch has examples of one source, or of all."] = "single"
    length_edges: Annotated[
        tuple[int, ...],
        "Borders between length groups; a batch has texts of one group.",
        "tokens",
    ] = ()
    token_budget: Annotated[
        int | None,
        "Maximum of a batch: its examples times the tokens of the longest text of their length "
        "group.",
        "tokens",
    ] = None
    batch_sizes: Annotated[
        tuple[int, ...], "Batch size of each length group, in place of batch_size.", "examples"
    ] = ()
    batching: Annotated[
        Batching | None,
        "Batch sizes by length: what memory takes (fit), or a table of the paper for 80 GB.",
    ] = None
    shuffle_segments: Annotated[
        float, "Share of the long positives whose thirds change places.", "share"
    ] = 0.0
    shuffle_at: Annotated[CutName, "Where positives are cut for that."] = "characters"
    refresh: Refresh | None = None  # mine negatives again with the model in training
    learning_rate: Annotated[float, "Learning rate at its peak."] = 2e-5
    schedule: Annotated[
        ScheduleName,
        "Course of the learning rate; wsd: warmup, stable, decay; early: the decay first.",
    ] = "linear"
    warmup: Annotated[float, "Part of the steps in which the learning rate rises.", "share"] = 0.1
    warmup_steps: Annotated[int | None, "Steps of the warmup; overrides warmup.", "steps"] = None
    decay: Annotated[
        float, "Part of the steps in which the rate falls; of the schedules wsd and early.", "share"
    ] = 0.1
    weight_decay: Annotated[float, "Weight decay of AdamW."] = 0.01
    clip: Annotated[float, "Maximum norm of the gradient."] = 1.0
    patience: Annotated[
        int | None, "Stop after this many evaluations without a better dev score.", "evaluations"
    ] = None

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise RecipeError(
                f"the stage {self.name} has a {type(self.objective).__name__} for its objective, "
                "which must have a property `traits` and a method `start` (see docs/extending.md)"
            )
        choices_of = {"in_batch": Policy, "mixing": Mixing, "shuffle_at": CutName}
        choices_of |= {} if self.batching is None else {"batching": Batching}
        choices_of |= {} if self.ignore_rule is None else {"ignore_rule": IgnoreRuleName}
        for name, choices in choices_of.items():
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise RecipeError(f"{name} is {getattr(self, name)!r}; choose from {known}")
        self._check_batch_sizes()
        self._check_ignoring()
        if self.refresh is not None and self.objective.traits.needs_scores:
            raise RecipeError(
                f"the stage {self.name} learns the scores of a reranker, and the negatives that a "
                "refresh mines have none; remove the refresh or that part of the objective"
            )
        above(0, self, "epochs", "learning_rate", "clip")
        at_least(1, self, "steps", "positives", "token_budget", "patience")
        at_least(4, self, "query_tokens", "document_tokens")  # two may be special tokens
        at_least(0, self, "negatives", "weight_decay", "warmup_steps")
        shares(self, "warmup", "decay", "shuffle_segments")
        edges = self.length_edges
        if list(edges) != sorted(set(edges)) or min(edges, default=1) < 1:
            raise RecipeError(
                f"length_edges are {edges}; give lengths above 0, each once, the smallest first"
            )

    @property
    def ignoring(self) -> IgnoreRule | None:
        """The rule by which likely false negatives are ignored, if there is one."""
        if self.ignore_rule is None:
            return None
        return IgnoreRule(kind=self.ignore_rule, value=self.ignore_value, own=self.ignore_own)

    def _check_ignoring(self) -> None:
        if self.ignoring is None:
            names = ("ignore_value", "ignore_own", "guide")
            values = {name: getattr(self, name) for name in names}
            if given := [name for name, it in values.items() if it is not None and it is not False]:
                raise RecipeError(
                    f"{given[0]} is given, but no rule; set ignore_rule to "
                    f"{' or '.join(get_args(IgnoreRuleName))}, or leave it out"
                )
        elif not self.objective.traits.contrasts:
            raise RecipeError(
                f"the stage {self.name} compares queries with no documents, so ignore_rule has "
                "nothing to ignore; leave it out"
            )
        elif self.in_batch == "none" and not self.ignore_own:
            raise RecipeError(
                f"in_batch is 'none' in the stage {self.name}, so ignore_rule has no documents of "
                "other examples to ignore; leave it out, or set ignore_own to true"
            )
        elif self.guide is None and "dense" not in self.objective.traits.kinds:
            raise RecipeError(
                f"ignore_rule compares dense scores, which the stage {self.name} does not train; "
                "add dense to its kinds, name a guide, or leave ignore_rule out"
            )
        elif self.guide is not None and self.refresh is not None:
            raise RecipeError(
                f"the stage {self.name} mines negatives during training, which a guide has not "
                "encoded; remove the guide, so that the model in training decides"
            )

    def _check_batch_sizes(self) -> None:
        ways = {
            "batch_sizes": bool(self.batch_sizes),
            "batching": self.batching is not None,
            "token_budget": self.token_budget is not None,
        }
        given = [name for name, is_given in ways.items() if is_given]
        if len(given) > 1:
            raise RecipeError(f"{' and '.join(given)} each set the size of a batch; give one")
        groups, sizes = len(self.length_edges) + 1, self.batch_sizes
        if sizes and (len(sizes) != groups or min(sizes) < LEAST):
            raise RecipeError(
                f"batch_sizes are {sizes}; give {groups}, of {LEAST} or more: one for the length "
                "group below each of length_edges, and one above the last"
            )
        if self.batching not in (None, "fit") and self.length_edges:
            raise RecipeError(
                f"the table {self.batching} has its own length groups; remove length_edges"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages that run in order, each starting from the weights of the one before it."""

    name: str
    model: Model
    stages: tuple[Stage, ...]
    seed: int = 0
    paper: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)  # where we depart from it, and why
    settings: Mapping[str, Any] = field(default_factory=dict)  # that a recipe function was given


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a recipe is run on this machine."""

    device: Annotated[
        str | None, "Device, such as cpu or cuda:1. Default: a GPU if there is one."
    ] = None
    dtype: Annotated[
        NumberType | None,
        "Type of matrix products; weights stay float32. Default: bfloat16 on a GPU that computes "
        "in it, else float32.",
    ] = None
    chunk_tokens: Annotated[
        int | None,
        "Tokens encoded together. Default: 2,048 on a CPU; on a GPU by its memory and the size of "
        "the model.",
        "tokens",
    ] = None
    memory_gb: Annotated[
        float | None,
        "Memory for kept activations. Default: a quarter of what is free on a CPU, 60 % on a GPU.",
        "GB",
    ] = None
    save_minutes: Annotated[float, "Time between checkpoints.", "minutes"] = 5.0
    save_steps: Annotated[int | None, "Also save a checkpoint after this many steps.", "steps"] = (
        None
    )
    eval_steps: Annotated[
        int | None,
        "Steps between evaluations on the dev set. Default: a tenth of a stage.",
        "steps",
    ] = None
    shard_weights: Annotated[
        bool, "Spread weights, gradients and optimizer over the processes (FSDP2)."
    ] = False
    checkpoint_activations: Annotated[
        bool | None,
        "Compute the activations of layers again instead of keeping them. Default: where they do "
        "not fit into memory.",
    ] = None
    compile_layers: Annotated[
        bool, "Compile each layer with torch.compile, which takes about a minute at the start."
    ] = False
    models_at: Annotated[
        tuple[int, ...],
        "Also save the model after these steps of the first stage; 0: before training.",
        "steps",
    ] = ()
    cache_tokens: Annotated[bool, "Tokenize training texts once and keep their tokens on disk."] = (
        False
    )
    workers: Annotated[
        int | None,
        "Threads that prepare the next batches; batches do not depend on their number. Default: "
        "on a GPU up to 4 of the free cores; on a CPU 1 if torch leaves a core free, else 0.",
        "threads",
    ] = None
    tensorboard: Annotated[bool, "Write files for TensorBoard too."] = False
    show_progress: bool = True

    def __post_init__(self) -> None:
        above(0, self, "save_minutes")
        at_least(1, self, "chunk_tokens", "save_steps", "eval_steps")
        at_least(0, self, "memory_gb", "workers")
        if self.compile_layers and (self.shard_weights or self.checkpoint_activations):
            other = "shard_weights" if self.shard_weights else "checkpoint_activations"
            raise RecipeError(f"compile_layers and {other} do not go together; remove one of them")
        if min(self.models_at, default=0) < 0:
            raise RecipeError(f"models_at is {list(self.models_at)}; give steps, 0 for the base")

    @property
    def shards_weights(self) -> bool:
        """Whether weights are spread over processes, which takes more than one."""
        return self.shard_weights and distributed.world() > 1

    @property
    def home(self) -> torch.device:
        """Where an embedder is between stages: sharded, it may be too large for one device."""
        return torch.device("cpu") if self.shards_weights else self.find_device()

    def find_device(self) -> torch.device:
        """Return the device asked for; by default a GPU if there is one.

        Raises:
            RecipeError: if there is no such device here, or several processes would share it.
        """
        return find_device(self.device)

    def resolved(self) -> "Run":
        """Return the run with the type of numbers that its device takes, if none was chosen."""
        return self if self.dtype else replace(self, dtype=number_type(self.find_device()))


def chosen(stages: Mapping[str, Stage], names: str) -> tuple[Stage, ...]:
    """Return the stages with these comma-separated names, in the order given.

    Raises:
        RecipeError: if a name is unknown, missing, or given twice.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted or set(wanted) - set(stages) or len(set(wanted)) < len(wanted):
        raise RecipeError(f"stages are {names!r}; choose from {', '.join(stages)}, each once")
    return tuple(stages[name] for name in wanted)


def above(limit: int, record: object, *fields: str) -> None:
    """Raise unless these fields are None or above ``limit``."""
    for name, value in _numbers(record, fields):
        if not (value > limit and isfinite(value)):
            raise RecipeError(f"{name} is {value}; give a number above {limit}")


def at_least(limit: int, record: object, *fields: str) -> None:
    """Raise unless these fields are None or at least ``limit``."""
    for name, value in _numbers(record, fields):
        if not (value >= limit and isfinite(value)):
            raise RecipeError(f"{name} is {value}; give {limit} or more")


def shares(record: object, *fields: str) -> None:
    """Raise unless these fields are None or between 0 and 1."""
    for name, value in _numbers(record, fields):
        if not 0 <= value <= 1:
            raise RecipeError(f"{name} is {value}; give a share, from 0 to 1")


def _numbers(record: object, fields: tuple[str, ...]) -> list[tuple[str, float | int]]:
    values = [(name, getattr(record, name)) for name in fields]
    return [(name, value) for name, value in values if value is not None]
