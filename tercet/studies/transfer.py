"""What a series of checkpoints is worth in each language, raw and after the same fine-tuning.

Transfer is quality in one language that comes from training on others. The figures of a checkpoint
as it is mislead: long pretraining harms what a short fine-tuning brings back. So each checkpoint is
fine-tuned alike before it is judged (arXiv 2412.04506, section 5).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from tercet.errors import RecipeError
from tercet.evaluate.report.intervals import Interval, interval, paired_difference, relative_change
from tercet.evaluate.suites.suite import average
from tercet.models.zoo.zoo import resolve
from tercet.recipes.arctic_embed import arctic_embed
from tercet.studies.cells import Cell
from tercet.studies.kept import Answers, fingerprint_of_model
from tercet.studies.languages import Language
from tercet.studies.run import Bench, measure_models, run_cells
from tercet.train.snapshots import models_in

Judged: TypeAlias = Literal["raw", "finetuned"]
JUDGED: Final[tuple[Judged, ...]] = ("raw", "finetuned")

EARLY: Final = 0.06  # share of the steps: 8K of 130K in the paper


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model and the step that it was saved at."""

    step: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Group:
    """A language, or those languages of a family that were seen, or were not."""

    name: str
    seen: bool
    languages: tuple[str, ...]
    is_family: bool = False

    @property
    def title(self) -> str:
        """Its name, and whether it was seen."""
        return f"{self.name} ({'seen' if self.seen else 'unseen'})"


def checkpoints_of(named: Sequence[str]) -> list[Checkpoint]:
    """The models of a run's series, or models in the order given, at least two.

    Models in folders that are named by numbers have these for steps; else they are counted from 1.

    Raises:
        RecipeError: when there are fewer, or one is given twice.
        ModelError: when one is no model.
    """
    series = models_in(Path(named[0])) if len(named) == 1 else {}
    if series:
        found = [Checkpoint(step, folder) for step, folder in series.items()]
    else:
        folders = [Path(resolve(name)) for name in named]
        numbers = [int(f.name) if f.name.isdigit() else None for f in folders]
        counted = list(range(1, len(folders) + 1))
        steps = counted if None in numbers else [n for n in numbers if n is not None]
        found = [Checkpoint(step, folder) for step, folder in zip(steps, folders, strict=True)]
        found.sort(key=lambda each: each.step)
    if len(found) < 2 or len({each.step for each in found}) < len(found):
        raise RecipeError(
            f"{', '.join(named)}: a series of two checkpoints or more is needed, each once; train "
            "with --models-at, such as 0,100,400,1000, and give the run folder, or give several "
            "models"
        )
    return found


def reference_of(steps: Sequence[int], wanted: int | None) -> int:
    """The place of the checkpoint that the last one is compared with.

    The one asked for, or the first at 6 % of the steps or later; the one before the last where
    there is no such.

    Raises:
        RecipeError: when there is none of this step, or it is the last one.
    """
    before = steps[:-1]
    if wanted is not None:
        if wanted not in before:
            raise RecipeError(
                f"the reference {wanted} is no checkpoint before the last one; choose from "
                f"{', '.join(map(str, before))}"
            )
        return before.index(wanted)
    late = [place for place, step in enumerate(before) if step >= EARLY * steps[-1]]
    return late[0] if late else len(before) - 1


def run_transfer(
    checkpoints: Sequence[Checkpoint],
    bench: Bench,
    finetuning: Mapping[str, Any],
    seeds: Sequence[int],
    say: Callable[[str], None],
) -> tuple[list[Answers], list[list[Answers]]]:
    """The answers of each checkpoint raw, and of each after its fine-tuning with each seed.

    ``finetuning`` are parameters of the recipe ``arctic_embed``; the bench holds its data under
    ``mined``. What was done before is not done again.

    Raises:
        RecipeError: when a seed stands there twice, or the folder holds another comparison.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(f"seeds are {', '.join(map(str, seeds))}; give one or more, each once")
    mined = [s for s in bench.data["mined"] if s.without_negatives == len(s)]
    bare = sum(map(len, mined))
    if bare:
        say(
            f"{bare:,} examples bring no negatives: each checkpoint mines its own for them, so "
            "data differ between checkpoints; mine once (tercet mine) to have them equal"
        )
    prints = {each.step: fingerprint_of_model(each.folder) for each in checkpoints}
    raw = measure_models({f"{c.step}-raw": c.folder for c in checkpoints}, bench, say)
    cells = []
    for seed in seeds:
        for each in checkpoints:
            recipe = arctic_embed(
                base=str(each.folder), stages="finetuning", seed=seed, **finetuning
            )
            name = f"{each.step}-seed-{seed}"
            cells.append(Cell(name, recipe, prints[each.step]))
    found = run_cells(cells, bench, say)
    tuned = [[found[f"{c.step}-seed-{seed}"][-1] for seed in seeds] for c in checkpoints]
    return [raw[f"{c.step}-raw"] for c in checkpoints], tuned


@dataclass(frozen=True, eq=False)
class Transfer:
    """Answers of all checkpoints, and what they are worth by language and family."""

    languages: Sequence[Language]
    steps: Sequence[int]
    raw: Sequence[Answers]  # of each step
    tuned: Sequence[Sequence[Answers]]  # of each step, of each seed
    reference: int  # place in steps
    seed: int = 0  # of the bootstrap

    @cached_property
    def groups(self) -> list[Group]:
        """Each language, and each family; a family of which only some were seen is two groups."""
        alone = [Group(each.name, each.seen, (each.name,)) for each in self.languages]
        families: dict[tuple[bool, str], list[str]] = {}
        for each in self.languages:
            families.setdefault((not each.seen, each.family), []).append(each.name)
        return alone + [
            Group(family, not unseen, tuple(names), is_family=True)
            for (unseen, family), names in sorted(families.items())
        ]

    def scores(self, judged: Judged, place: int, language: str) -> np.ndarray:
        """The nDCG@10 of each query; after fine-tuning, the mean over seeds."""
        if judged == "raw":
            return self.raw[place][language]
        return np.mean([answers[language] for answers in self.tuned[place]], axis=0)

    def figure(self, judged: Judged, place: int, group: Group) -> Interval:
        """The mean over queries, and of a family over its languages."""
        found = [self._figures[judged, place, language] for language in group.languages]
        return found[0] if len(found) == 1 else average(found)

    @cached_property
    def _figures(self) -> dict[tuple[Judged, int, str], Interval]:
        """Of each language, once: a bootstrap takes its time."""
        return {
            (judged, place, each.name): interval(
                self.scores(judged, place, each.name), seed=self.seed
            )
            for judged in JUDGED
            for place in range(len(self.steps))
            for each in self.languages
        }

    def best(self, group: Group) -> int:
        """The step at which a group is best after the fine-tuning."""
        places = range(len(self.steps))
        means = [self.figure("finetuned", place, group).mean for place in places]
        return self.steps[int(np.argmax(means))]

    def difference(self, judged: Judged, group: Group) -> Interval:
        """How much better the last checkpoint is than the reference, on the same queries."""
        found = [
            paired_difference(
                self.scores(judged, -1, language),
                self.scores(judged, self.reference, language),
                seed=self.seed,
            )
            for language in group.languages
        ]
        return found[0] if len(found) == 1 else average(found)

    def change(self, judged: Judged, group: Group) -> Interval:
        """The same as a share of the reference: -0.1 is a tenth less."""
        last = [self.scores(judged, -1, language) for language in group.languages]
        first = [self.scores(judged, self.reference, language) for language in group.languages]
        return relative_change(last, first, seed=self.seed)

    def spread(self, place: int, group: Group) -> float | None:
        """The standard deviation over seeds after the fine-tuning; None of a single seed."""
        if len(self.tuned[place]) < 2:
            return None
        means = [
            np.mean([answers[language].mean() for language in group.languages])
            for answers in self.tuned[place]
        ]
        return float(np.std(means, ddof=1))
