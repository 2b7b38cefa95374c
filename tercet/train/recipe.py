"""What a recipe is made of. A recipe holds no code that runs: it only says what to run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tercet.nn.backbone import Attention, Window
from tercet.nn.pooling import PoolingName
from tercet.objectives.contrastive import Contrastive
from tercet.train.schedule import ScheduleName


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Train low-rank updates of the linear layers and freeze everything else; peft applies it."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Model:
    """Which network, and how its hidden states become vectors. None: as the model says itself."""

    base: str  # a zoo name, a local folder, or a name on the hub
    pooling: PoolingName | None = None
    attention: Attention | None = None
    window: Window | None = None
    lora: Lora | None = None  # None: every weight is trained
    freeze_embeddings: bool = False  # leave the token table as it is
    prompts: Mapping[str, str] | None = None  # role -> what is put before its texts
    pool_prompt: bool | None = None
    query_tokens: int | None = None  # a longer text is cut
    document_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One uninterrupted run of one objective over one mixture of data."""

    name: str
    objective: Contrastive
    epochs: float = 1.0
    steps: int | None = None  # overrides epochs
    batch_size: int = 64  # examples of one optimizer step, over all processes
    positives: int = 1  # of one query in a batch, at most
    negatives: int = 8  # mined ones of one query, at most
    in_batch: bool = True  # whether other examples' documents are negatives
    mixing: Literal["single", "blended"] = "single"  # one source a batch, or all in each
    length_edges: tuple[int, ...] = ()  # borders of length groups, in tokens; a batch has one group
    token_budget: int | None = None  # with length_edges: tokens of a batch's longest texts, at most
    learning_rate: float = 2e-5  # at the peak
    schedule: ScheduleName = "linear"
    warmup: float = 0.1  # share of the steps
    decay: float = 0.1  # share of the steps; of the warmup-stable-decay schedule only
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    patience: int | None = None  # evaluations without a better result until it stops


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages run in order, each starting from the weights the one before it left."""

    name: str
    model: Model
    stages: tuple[Stage, ...]
    seed: int = 0
    paper: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)  # where we depart from it, and why
