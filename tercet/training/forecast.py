"""What a run will do, before it does it: steps, batches, tokens, time and memory of each stage."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from tercet import distributed
from tercet.data.batches.sampler import Sampler
from tercet.data.files.sources import Source
from tercet.files.progress import time_text
from tercet.models.embedder import Embedder
from tercet.objectives.objective import Work
from tercet.segments import Packed
from tercet.training.batches import Groups, collator_of, groups_of, sampled, sampler_of
from tercet.training.log import Candidates
from tercet.training.memory import COPIES, states_to_come, step_memory
from tercet.training.plan import TrainingPlan
from tercet.training.recipe import Stage

LOOKED_AT: Final = 64  # examples of the first batch whose tokens are counted
TIMED_SECONDS: Final = 0.3  # at least, of the network's forward pass
_SOURCES: Final = 4  # whose texts are timed
_TOGETHER: Final = 8  # texts
_FORWARDS: Final = 3.0  # that a step costs: a forward and a backward of twice its operations
_NUMBER: Final = 4  # bytes of a weight


@dataclass(frozen=True, slots=True, kw_only=True)
class StageForecast:
    """Estimates for one stage; time and memory are rough, the others are what will happen."""

    stage: str
    reads: str  # names of its sources
    steps: int | None  # None: known once its texts are tokenized
    batch: str
    candidates: str  # documents that a query is compared with; "-" if none
    tokens: float  # of a step, over all processes
    seconds: float | None  # without measurements on the dev set and mining
    memory_gb: float  # of each process
    machine: str  # device, type of numbers, tokens encoded together

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of the stage in a table with the columns ``HEADER``."""
        steps = "-" if self.steps is None else f"{self.steps:,}"
        spent = "-" if self.seconds is None else time_text(self.seconds)
        memory = f"{self.memory_gb:.1f} GB"
        tokens = f"{self.tokens:,.0f}"
        return (self.stage, self.reads, steps, self.batch, self.candidates, tokens, spent, memory)


HEADER: Final = ("stage", "reads", "steps", "batch", "candidates", "tokens/step", "time", "memory")


def forecast(plan: TrainingPlan, embedder: Embedder) -> list[StageForecast]:
    """Estimate what each stage takes, from one of its batches and the speed of the network here.

    Nothing that a training depends on is changed: weights, random numbers, files. All processes
    have to call this.

    Raises:
        RecipeError: if a stage cannot work, such as with fewer examples than a batch needs.
        ModelError: if an objective does not fit the model.
    """
    devices = [embedder.device] if embedder.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        stages = list(zip(plan.recipe.stages, plan.sources, strict=True))
        drafts = [_of_stage(plan, stage, sources, embedder) for stage, sources in stages]
        second = (
            None
            if plan.run.shards_weights
            else seconds_of_token(embedder, stages[0][1], half=plan.run.dtype == "bfloat16")
        )
    return [_timed(each, second) for each in drafts]


def lines_of(stages: Sequence[StageForecast]) -> list[str]:
    """Return a table of the stages for people, the sum first."""
    rows = [HEADER, *(each.cells for each in stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  " + "  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    known = [each.seconds for each in stages if each.seconds is not None]
    spent = f"about {time_text(sum(known))}, " if len(known) == len(stages) else ""
    memory = max(each.memory_gb for each in stages)
    count = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
    return [
        f"plan: {count}, {spent}{memory:.1f} GB of memory (estimates, without measuring the dev "
        "set and mining)",
        *table,
        *_machine_lines(stages),
    ]


def _machine_lines(stages: Sequence[StageForecast]) -> list[str]:
    """Describe how batches are encoded here, once for stages that do the same."""
    ways: dict[str, list[str]] = {}
    for each in stages:
        ways.setdefault(each.machine, []).append(each.stage)
    named = len(ways) > 1
    return [f"  {', '.join(of) + ' ' if named else ''}on {way}" for way, of in ways.items()]


@torch.no_grad()
def seconds_of_token(
    embedder: Embedder, sources: Sequence[Source], *, half: bool = False
) -> float | None:
    """Measure the forward pass of the network for a token of texts like those of the data."""
    some = [each for source in sources[:_SOURCES] for _, each in sampled(source)]
    texts = [text for each in some for text in (each.query, *each.positives, *each.negatives)]
    if not texts:
        return None
    limit = min(embedder.settings.max_tokens("document"), embedder.backbone.max_tokens)
    training, device = embedder.training, embedder.device
    embedder.eval()
    tokens, seconds = 0, 0.0

    def run(packed: Packed) -> float:
        began = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            embedder.states(packed)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    try:
        for begin in range(0, len(texts), _TOGETHER):
            some = embedder.tokenizer(texts[begin : begin + _TOGETHER], limit)
            packed = some.pack().to(device)
            run(packed)  # the first call of a shape is slower
            seconds += run(packed)
            tokens += len(packed.ids)
            if seconds > TIMED_SECONDS:
                break
    finally:
        embedder.train(training)
    return seconds / tokens if tokens else None


def _of_stage(
    plan: TrainingPlan, stage: Stage, sources: Sequence[Source], embedder: Embedder
) -> StageForecast:
    lora = plan.recipe.model.lora
    memory = step_memory(embedder, stage.objective.traits.kinds, plan.run, lora=lora)
    budget, chunk = memory.budget, memory.chunk_tokens
    candidates, groups, steps, texts = "-", None, stage.steps, stage.batch_size
    block = stage.objective.traits.block_tokens
    if block is not None:
        tokens = float(stage.batch_size * min(block, embedder.backbone.max_tokens))
        batch = f"{stage.batch_size:,} blocks"
    else:
        work = stage.objective.start(
            embedder, sources, collator_of(embedder, stage, plan.prompt_of)
        )
        try:
            groups = groups_of(stage, work.drawn, embedder, budget, chunk)
            sampler = sampler_of(stage, work.drawn, plan.recipe.seed, embedder, groups)
            steps = stage.steps or sampler.total_batches
            texts, tokens, batch = _of_batch(work, sampler, groups, stage, plan.recipe.seed)
        finally:
            work.finish()
        if stage.objective.traits.contrasts:
            sizes = groups or Groups((), (min(stage.batch_size, sum(map(len, work.drawn))),))
            counts = Candidates.of(stage, sources)
            found = [] if counts is None else [round(counts.in_batch(x)) for x in sizes.sizes]
            ends = dict.fromkeys((*found[:1], *found[-1:]))
            candidates = " to ".join(f"{each:,}" for each in ends) or "-"
    names = [f"{x.name} (scored)" if x.scored == len(x) else x.name for x in sources]
    length = max(1, round(tokens / max(1, texts)))
    share = tokens / distributed.world()
    graphs = min(share * budget.graph(length), budget.total)
    one_chunk = min(share, chunk) * budget.graph(length)
    vectors = COPIES * budget.vectors(texts, share)
    return StageForecast(
        stage=stage.name,
        reads=", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else ""),
        steps=steps,
        batch=batch,
        candidates=candidates,
        tokens=tokens,
        seconds=None,
        memory_gb=(_weights(embedder, plan) + max(graphs, one_chunk) + vectors) / 1e9,
        machine=memory.line(plan.run.dtype),
    )


def _of_batch(
    work: Work, sampler: Sampler, groups: Groups | None, stage: Stage, seed: int
) -> tuple[int, float, str]:
    """Return the texts and tokens of a batch, and its size for people, by the first batch."""
    rows = sampler.next_batch()
    assert rows is not None, "a sampler without a batch refuses its data"
    part = rows.share(0, max(1, len(rows) // LOOKED_AT))
    seen = work.batch(part, [seed, 0]).texts
    scale = len(rows) / len(part)
    size = f"{min(stage.batch_size, len(rows)):,}" if groups is None else groups.summary
    return round(len(seen) * scale), len(seen.ids) * scale, f"{size} {work.unit.partition(',')[0]}"


def _timed(draft: StageForecast, second: float | None) -> StageForecast:
    if second is None or draft.steps is None:
        return draft
    share = draft.tokens / distributed.world()
    return replace(draft, seconds=draft.steps * share * second * _FORWARDS)


def _weights(embedder: Embedder, plan: TrainingPlan) -> float:
    """Return the bytes of weights, gradients and the optimizer's state, and of copies."""
    to_come = states_to_come(embedder, plan.run, plan.recipe.model.lora)
    if embedder.device.type != plan.run.find_device().type:  # they are counted there
        return to_come
    return to_come + _NUMBER * sum(p.numel() for p in embedder.parameters())
