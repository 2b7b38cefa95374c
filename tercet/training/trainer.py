"""One stage of a run: its optimizer, its place in the data, and its checkpoints."""

import hashlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor, nn

from tercet import distributed
from tercet.ahead import done_ahead, usual_workers
from tercet.data.batches.sampler import BatchRows, Sampler
from tercet.errors import RecipeError, TrainingError
from tercet.files.atomic import replacing_file
from tercet.files.checksums import seal_archive
from tercet.files.console import say
from tercet.files.progress import Advance, bar, notes
from tercet.files.signals import Interrupted, Listener, Stopped, stopped, waiting
from tercet.models.embedder import Embedder
from tercet.models.frozen import FrozenInHalf
from tercet.models.network.checkpointing import recomputed
from tercet.models.network.chunked import Chunks, Losses
from tercet.models.network.cpu.precision import warning_of
from tercet.models.network.layers import compile_layers, layers_of
from tercet.objectives.objective import PreparedWork, TextBatch
from tercet.sharding import clip_gradients, is_sharded
from tercet.training import checkpoint, optimizer
from tercet.training.batches import (
    Groups,
    collator_of,
    groups_of,
    guide_of,
    sampler_of,
    with_cached_tokens,
)
from tercet.training.log import LOG, Candidates, FirstSteps, Log, SparseAlarm
from tercet.training.memory import step_memory
from tercet.training.plan import CHECKPOINT, MADE_WITH, TrainingPlan, identity, is_refreshed
from tercet.training.recipe import Stage
from tercet.training.refresh import Refresher
from tercet.training.sharded import ShardedEmbedder, require_shardable
from tercet.training.snapshots import Snapshots

BEST: Final = "best.pt"

Score = Callable[[Embedder], float | Mapping[str, float]]
"""Measures an embedder on the dev set; higher is better.

Of several figures, by name, the one under ``dev_score`` counts, and all are logged.
"""


@dataclass(frozen=True, slots=True, eq=False)
class MadeBatch:
    """A batch that was made before its step, and where the sampler is once it has been trained."""

    rows: BatchRows  # of all processes
    texts: TextBatch  # of this one
    place: Mapping[str, int]


class Trainer:
    """Trains one stage, measures it, and goes on with it after a kill."""

    def __init__(
        self,
        embedder: Embedder,
        stage: Stage,
        folder: Path,
        plan: TrainingPlan,
        begins_with: dict[str, str],
        snapshots: Snapshots | None = None,
    ) -> None:
        recipe, run = plan.recipe, plan.run
        self.sources = plan.sources[recipe.stages.index(stage)]
        self.embedder, self.stage, self.folder, self.snapshots = embedder, stage, folder, snapshots
        self.seed, self.options, self.say = recipe.seed, run, plan.say
        collate = collator_of(embedder, stage, plan.prompt_of)
        if run.cache_tokens:
            collate = with_cached_tokens(collate, embedder, stage, self.sources)
        self.refresher, guided = None, dict[str, str]()
        if stage.guide is not None:
            guide, guided = guide_of(stage.guide, self.sources, run)
            collate = replace(collate, guide=guide)
        if stage.refresh is not None and is_refreshed(stage, self.sources):
            self.refresher = Refresher(stage.refresh, self.sources, folder, recipe.seed)
            self.sources = self.refresher.sources
        self.work = stage.objective.start(embedder, self.sources, collate)
        self.sharded = None
        if run.shards_weights:
            require_shardable(stage)
            self.sharded = ShardedEmbedder(embedder, run.find_device())
        if run.compile_layers and not compile_layers(embedder.backbone):
            raise RecipeError(
                f"{type(embedder.backbone.model).__name__} has no list of layers to compile; "
                "leave compile_layers out"
            )
        self.optimizer = optimizer.adamw(embedder, stage)
        memory = step_memory(embedder, stage.objective.traits.kinds, run)
        self.recomputed = layers_of(embedder.backbone) if memory.recomputed else []
        self.chunk_tokens, self.budget = memory.chunk_tokens, memory.budget
        self.frozen: FrozenInHalf | None = None  # while steps are taken
        if run.dtype == "bfloat16" and self.sharded is None:
            self.frozen = FrozenInHalf(embedder.backbone.model)
        self.progress, self.alarm = checkpoint.StageProgress(), SparseAlarm()
        self._first = FirstSteps(0)
        self.groups: Groups | None = None  # batch sizes by length
        self.sampler: Sampler  # made by resume(), unless the stage is finished
        self._place: Mapping[str, int]  # of the sampler, after the batch that was trained last
        self._made: Generator[MadeBatch, None, None] | None = (
            None  # the next batches, up to a refresh
        )
        read = begins_with | guided | ({} if self.refresher is None else self.refresher.read)
        if isinstance(self.work, PreparedWork):
            read |= self.work.reads
        self.what = identity(recipe, stage, self.sources, run, begins_with=read)

    @cached_property
    def steps(self) -> int:
        """Steps of the whole stage."""
        return self.stage.steps or self.sampler.total_batches

    @property
    def _half(self) -> bool:
        return self.options.dtype == "bfloat16"

    @cached_property
    def _warmup(self) -> int:
        given = self.stage.warmup_steps
        return round(self.stage.warmup * self.steps) if given is None else given

    def run(self, score: Score | None) -> None:
        """Train to the end."""
        if isinstance(self.work, PreparedWork):
            if not self.progress.finished:
                shown = self.options.show_progress and distributed.is_main()
                self.work.prepare(partial(bar, shown=shown))
            self.work.settle()
        self._train(score)

    def _train(self, score: Score | None) -> None:
        self._check_snapshots()
        if self.progress.finished:
            self.say(f"{self.folder}: this stage is finished already; taking its weights")
            self._end()
            return
        self._prove()
        if self.progress.step == 0:
            self._introduce()
            self._evaluate(score)
        self._keep_model()
        saved_at = started = time.monotonic()
        log, step = None, self.progress.step
        self._place, self._first = self.sampler.state(), FirstSteps(step)
        shown = self.options.show_progress and distributed.is_main()
        with ExitStack() as stack:
            if distributed.is_main():  # one file has one writer
                log = Log(self.folder, step=step, tensorboard=self.options.tensorboard)
                stack.callback(log.close)
            advance = stack.enter_context(
                bar(self.stage.name, self.steps, step, shown=shown, unit="step ")
            )
            listener = stack.enter_context(waiting())
            stack.callback(self._drop_batches)
            before, patience = self.progress.seconds, self.stage.patience or math.inf
            eval_steps = self.options.eval_steps or max(1, math.ceil(self.steps / 10))
            while self.progress.step < self.steps and self.progress.stale < patience:
                self._refresh(log, advance, listener)
                stop = self._step(log, advance, listener)
                self.progress.seconds = before + time.monotonic() - started
                self._keep_model()  # before a checkpoint, after which it would not be made again
                if self._due(eval_steps):
                    self._evaluate(score, log)
                if stop:
                    self._stop(stop)
                if self._should_save(time.monotonic() - saved_at):
                    self._save()
                    saved_at = time.monotonic()
        self.progress.finished = True
        self._save()
        noted = torch.tensor([listener.number])  # during the last measurement
        if stop := int(distributed.gather_ints(noted).max()):
            self._stop(stop, saved=True)
        if cut := self.progress.truncated:
            self.say(f"{cut:,} times a text was longer than the model takes, and was cut")
        self._end()

    def _prove(self) -> None:
        """Check that texts are read rightly on this device, in the type of this training."""
        if self.sharded is None:
            with torch.autocast(self.embedder.device.type, torch.bfloat16, enabled=self._half):
                self.embedder.backbone.prove()

    def _end(self) -> None:
        """Leave the embedder whole, with the weights that stay."""
        self._take_best()
        if self.frozen is not None:
            self.frozen.restore()
        if self.sharded is not None:
            self.sharded.put_together()
        self.work.finish()

    def _step(self, log: Log | None, advance: Advance, listener: Listener) -> int:
        """Take a step; return the number of the signal that any process got since the last one."""
        began, step = time.monotonic(), self.progress.step
        if self._made is None:
            self._made = done_ahead(self._drawn_batches(), self._workers)
        made = next(self._made)
        rows, batch = made.rows, made.texts
        rate = self.stage.learning_rate * optimizer.factor(
            self.stage.schedule,
            step,
            self.steps,
            warmup=self._warmup,
            decay=round(self.stage.decay * self.steps),
        )
        shares = self._backward(batch)
        weights = [p for p in self.embedder.parameters() if p.requires_grad]
        distributed.sum_gradients([p for p in weights if not is_sharded(p)])
        own = [len(batch.texts.ids), batch.truncated, listener.number]
        losses, norm, counts = everyones(shares, self._clipped(weights), own)
        loss = losses["loss"]
        if not math.isfinite(loss):
            raise TrainingError(self._complaint(f"the loss is {loss}", rows))
        if not math.isfinite(norm):
            raise TrainingError(self._complaint(f"the norm of the gradient is {norm}", rows))
        if (idle := self._first.after_step(self.steps, norm, losses)) is not None:
            raise TrainingError(f"the stage {self.stage.name}: {idle} (tercet check)")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        self._place = made.place
        tokens, truncated, _ = counts.sum(0).tolist()
        seconds = time.monotonic() - began
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.truncated += truncated
        stop = int(counts[:, 2].max())
        advance(1, f"loss {loss:.4f}  rate {rate:.2e}  {tokens / seconds:,.0f} tokens/s")
        if log is not None:
            log.write(
                self.progress.step,
                **losses,
                learning_rate=rate,
                gradient_norm=norm,
                tokens=tokens,
                tokens_per_second=round(tokens / seconds, 1),
                examples=len(rows),
                truncated=truncated,
            )
        if "empty_sparse" in losses and distributed.is_main():
            self.alarm.after_step(self.progress.step, losses["empty_sparse"])
        return stop

    def _stop(self, number: int, *, saved: bool = False) -> NoReturn:
        """End the run after a signal, in all processes once the first has saved a checkpoint."""
        if not saved:
            self._save()
        distributed.barrier()
        path = self.folder / CHECKPOINT
        line = (
            f"stopped after step {self.progress.step} of {self.steps} ({self.stage.name}); "
            f"{path} is written, and the same command goes on from there"
        )
        if distributed.is_main():
            say(f"tercet: {line}")
        raise stopped(number, line)

    @property
    def _workers(self) -> int:
        given = self.options.workers
        if given is not None:
            return given
        return usual_workers(self.embedder.device, distributed.local_world_size())

    def _drawn_batches(self) -> Iterator[Callable[[], MadeBatch]]:
        """Draw the batches of the next steps, up to a refresh, whose negatives later ones read."""
        first = self.progress.step
        for step in range(first, self.steps):
            if step > first and self.refresher is not None and self.refresher.due(step):
                return
            rows = self.sampler.next_batch()
            assert rows is not None, "a stage has no more steps than its data have batches"
            yield partial(self._batch, rows, step, self.sampler.state())

    def _batch(self, rows: BatchRows, step: int, place: Mapping[str, int]) -> MadeBatch:
        """Make this process's share of a batch; in any thread, since it changes nothing."""
        mine = rows.share(distributed.rank(), distributed.world())
        return MadeBatch(rows, self.work.batch(mine, [self.seed, step]), place)

    def _drop_batches(self) -> None:
        """Leave the batches that were made ahead, once no thread works on them."""
        if self._made is not None:
            self._made.close()
        self._made = None

    def _clipped(self, weights: list[nn.Parameter]) -> Tensor:
        """Clip the gradients, and return their norm before."""
        if self.sharded is not None:
            return clip_gradients(weights, self.stage.clip)
        return nn.utils.clip_grad_norm_(weights, self.stage.clip)

    def _backward(self, batch: TextBatch) -> Losses:
        self.embedder.train()
        if self.frozen is not None:
            self.frozen.shrink()
        step = self.progress.step
        seed = _seed_of(self.seed, step, distributed.rank())
        half, sharded = self._half, self.sharded is not None
        device = self.embedder.device.type
        graph_tokens = self.budget.graph_tokens(batch.texts)
        chunks = Chunks(self.chunk_tokens, graph_tokens, seed, in_step=sharded)
        # The cache would hold the whole model in 16 bits until the end of the step.
        cached = torch.is_autocast_cache_enabled() and not sharded
        with (
            torch.autocast(device, dtype=torch.bfloat16, enabled=half, cache_enabled=cached),
            recomputed(self.recomputed),
        ):
            return self.work.backward(batch, chunks, step)

    def _refresh(self, log: Log | None, advance: Advance, listener: Listener) -> None:
        """Mine negatives again if it is time, after a checkpoint, so that a kill costs little."""
        step = self.progress.step
        if self.refresher is None or not self.refresher.due(step):
            return
        self._drop_batches()
        self._save()
        alone = distributed.world() == 1  # others would wait for a process that stops here
        try:
            with listener.at_once() if alone else nullcontext(), self._whole(main_alone=False):
                found = self.refresher.mine(self.embedder, step, bars=notes(advance))
        except (Interrupted, Stopped):
            self._stop(listener.number, saved=True)
        self.say(f"after step {step}: {found.summary}")
        if log is not None:  # the next step reads them
            log.write(
                step + 1,
                negatives=found.negatives,
                new_negatives=round(found.new_share, 4),
                without_negatives=found.empty,
            )

    def _check_snapshots(self) -> None:
        """Refuse snapshots after steps that never come, and report those that are missed."""
        if self.snapshots is None:
            return
        steps = None if self.progress.finished else self.steps
        if missed := self.snapshots.missed(self.progress, steps):
            self.say(
                f"{self.snapshots.folder}: no model after step {', '.join(map(str, missed))}, "
                "which the run has behind it; a run in a new folder makes it"
            )

    def _keep_model(self) -> None:
        step = self.progress.step
        if self.snapshots is None or step not in self.snapshots.steps:
            return
        with self._whole(main_alone=True):
            if distributed.is_main():
                self.snapshots.keep(self.embedder, step, self.record())

    # ---- measuring ---------------------------------------------------------------------------

    def _evaluate(self, score: Score | None, log: Log | None = None) -> None:
        """Measure on the dev set, and keep the weights if they are the best so far."""
        if score is None:
            return
        with self._whole(main_alone=True):
            found = score(self.embedder.eval()) if distributed.is_main() else 0.0
        figures = dict(found) if isinstance(found, Mapping) else {"dev_score": found}
        value = distributed.broadcast_object(figures["dev_score"])
        progress = self.progress
        progress.scores.append((progress.step, value))
        if log is not None:
            log.write(progress.step, **figures)
        self.alarm.after_evaluation(progress.step, figures)
        if progress.step == 0 and isinstance(self.work, PreparedWork):
            return  # not in the space of the model whose vectors it learns
        if progress.best_score is None or value > progress.best_score:
            progress.best_score, progress.best_step, progress.stale = value, progress.step, 0
            weights = checkpoint.weights_of(self.embedder) if self.stage.keep == "best" else None
            if distributed.is_main() and weights is not None:
                with replacing_file(self.folder / BEST) as fresh:
                    torch.save(weights, fresh)
                    seal_archive(fresh)
        else:
            progress.stale += 1

    def _whole(self, *, main_alone: bool) -> AbstractContextManager[None]:
        """Make the embedder whole for use; in the other processes it may stay sharded."""
        if self.frozen is not None:  # the next step shrinks them again
            self.frozen.restore()
        return nullcontext() if self.sharded is None else self.sharded.whole(main_alone=main_alone)

    def _take_best(self) -> None:
        """Take the weights that scored best, or the last ones if nothing was measured."""
        distributed.barrier()
        progress = self.progress
        if progress.best_score is None:
            return
        best = self.stage.keep == "best"
        taken = "those weights" if best else f"the last ones, {progress.scores[-1][1]:.4f}"
        self.say(
            f"dev set: {progress.scores[0][1]:.4f} before training, {progress.best_score:.4f} at "
            f"best, after step {progress.best_step} of {progress.step}; taking {taken}"
        )
        if best and progress.best_step != progress.step:
            weights = checkpoint.read_weights(
                self.folder / BEST, self.embedder, mapped=self.sharded is not None
            )
            checkpoint.restore(self.embedder, weights)

    def _due(self, every: int | None) -> bool:
        step = self.progress.step
        return every is not None and (step % every == 0 or step == self.steps)

    # ---- going on ----------------------------------------------------------------------------

    def resume(self, *, begun: bool = False) -> None:
        """Go on from the last checkpoint, if there is one; say so if a run had ``begun``."""
        mapped = self.sharded is not None
        found = checkpoint.load(self.folder / CHECKPOINT, self.what, mapped=mapped)
        if found is None and (begun or (self.folder / LOG).exists()):
            self.say(
                f"{self.folder}: an earlier run left no checkpoint here ({CHECKPOINT}); "
                "starting over from step 0"
            )
        if found is None or not found[0].finished:
            self._prepare_batches(None if found is None else found[1].get("groups"))
        step = torch.tensor([0 if found is None else found[0].step])
        if len(distributed.gather_ints(step).unique()) > 1:
            raise RecipeError(
                f"{self.folder}: processes find different checkpoints there; "
                "give an --out that all of them share"
            )
        if found is not None:
            self.progress, states = found
            self.alarm = SparseAlarm.restored(states.get("alarm", {}))
            checkpoint.restore(self.embedder, states["weights"])
            if self.progress.finished:
                return
            if self.refresher is not None:
                self.refresher.restore(states.get("refresh"), self.progress.step)
            optimizer.restore(self.optimizer, self.embedder, states["optimizer"])
            self.sampler.restore(states["sampler"])
            self.say(f"going on from step {self.progress.step} of {self.steps}")

    def _prepare_batches(self, groups: Any) -> None:
        """Make the sampler, which refuses data without a batch; ``groups`` are a checkpoint's."""
        stage, drawn, embedder = self.stage, self.work.drawn, self.embedder
        if groups is None:
            self.groups = groups_of(stage, drawn, embedder, self.budget, self.chunk_tokens)
        else:
            self.groups = Groups(*map(tuple, groups))
        self.sampler = sampler_of(stage, drawn, self.seed, embedder, self.groups)

    def _should_save(self, seconds: float) -> bool:
        """Whether to save; clocks differ, so the first process decides if all take part."""
        late = seconds >= 60 * self.options.save_minutes
        late = late if self.sharded is None else distributed.broadcast_object(late)
        return self._due(self.options.save_steps) or late

    def _save(self) -> None:
        if not distributed.is_main() and self.sharded is None:
            return
        weights = checkpoint.weights_of(self.embedder)
        state = optimizer.state_of(self.optimizer, self.embedder)
        if not distributed.is_main():
            return
        checkpoint.save(
            self.folder / CHECKPOINT,
            self.what,
            self.progress,
            weights=weights,
            optimizer=state,
            sampler=dict(self._place),
            groups=None if self.groups is None else [list(x) for x in astuple(self.groups)],
            refresh=None if self.refresher is None else self.refresher.state,
            alarm=asdict(self.alarm),
        )

    # ---- reports -----------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Return what was done, for the manifest of a saved model."""
        digest = hashlib.blake2b(digest_size=16)
        for name, weight in checkpoint.trainable(self.embedder).items():
            digest.update(name.encode())
            digest.update(weight.detach().float().cpu().numpy().tobytes())
        (found, groups), scores = self._candidates(), self.progress.scores
        return {
            "stage": self.stage.name,
            "objective": repr(self.stage.objective),
            "steps": self.progress.step,
            "batch_size": self.stage.batch_size,
            "learning_rate": self.stage.learning_rate,
            "tokens": self.progress.tokens,
            "seconds": round(self.progress.seconds, 1),
            "data": {source.name: source.fingerprint for source in self.sources},
            "lora": self.embedder.backbone.has_lora,
            "weights": digest.hexdigest(),
            MADE_WITH: self.what,
            **({"dev_scores": [list(each) for each in scores]} if scores else {}),
            **(
                {"candidates": round(found.in_batch(max(groups.sizes)), 1)}
                if found is not None
                else {}
            ),
        }

    def _candidates(self) -> tuple[Candidates | None, Groups]:
        """Return how many documents a query is compared with, if it is; and sizes of batches."""
        rows = sum(map(len, self.work.drawn))
        groups = self.groups or Groups((), (min(self.stage.batch_size, rows),))
        if not self.stage.objective.traits.contrasts:
            return None, groups
        return Candidates.of(self.stage, self.sources), groups

    def _introduce(self) -> None:
        count = sum(p.numel() for p in self.embedder.parameters() if p.requires_grad)
        rows = sum(map(len, self.work.drawn))
        size = min(self.stage.batch_size, rows) if self.groups is None else self.groups.summary
        self.say(
            f"{self.stage.name}: {self.steps} steps of {size} {self.work.unit}; "
            f"{count:,} weights in training"
        )
        kind = getattr(torch, self.options.dtype or "float32")
        if (warning := warning_of(kind, self.embedder.device)) is not None:
            self.say(f"tercet: note: {warning}")
        if self._half and (dropout := self.embedder.backbone.dropout_left_out):
            self.say(
                f"tercet: note: the dropout of attention weights, {dropout:g}, is left out: fused "
                "kernels in bfloat16 have none; other dropout stays"
            )
        found, groups = self._candidates()
        if found is not None:
            self.say(found.summary(groups))
        if pairs := sum(source.scored for source in self.sources):
            self.say(
                f"{pairs:,} of the rows are pairs with a similarity score, and learn its order "
                "(CoSENT)"
            )

    def _complaint(self, problem: str, rows: BatchRows) -> str:
        pairs = list(zip(rows.source.tolist(), rows.row.tolist(), strict=True))
        places = [f"{self.sources[s].name} example {r + 1}" for s, r in pairs[:5]]
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        kept = self.folder / CHECKPOINT
        last = f"the last good checkpoint is {kept}" if kept.exists() else "no checkpoint yet"
        return (
            f"step {self.progress.step + 1}: {problem}; its batch holds {', '.join(places)}{more}; "
            f"{last}. Look at these examples (tercet check), or lower the learning rate"
        )


def _seed_of(*numbers: int) -> int:
    """Return one seed from several numbers, the same on every machine."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 61)
    return mixed


def everyones(
    shares: Losses, norm: Tensor, counts: list[int]
) -> tuple[dict[str, float], float, Int[Tensor, "processes counts"]]:
    """Return sums of losses over all processes, the norm of the gradient, and everyone's counts.

    The device is waited for once.
    """
    wide = torch.promote_types(norm.dtype, torch.float32)
    numbers = [*(share.detach().float() for share in shares.values()), norm]
    where = shares["loss"].device
    read = torch.stack([number.reshape(()).to(where, wide) for number in numbers]).tolist()
    own = torch.tensor([[*read[:-1], *counts]], dtype=torch.float64)
    every = distributed.gather_rows(own)
    sums = [float(column.float().sum()) for column in every[:, : len(shares)].T]
    return (
        dict(zip(shares, sums, strict=True)),
        read[-1],
        every[:, len(shares) :].to(torch.int64),
    )
