"""Models of a stage after some of its steps, saved to be compared later."""

from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.training.checkpoint import StageProgress

STEPS: Final = "steps"  # the folder of a stage's snapshots, which are named by their steps


@dataclass(frozen=True, slots=True)
class Snapshots:
    """After which steps of a stage its model is saved, and where."""

    folder: Path
    steps: tuple[int, ...]
    describe: Callable[[Embedder, Mapping[str, Any]], None]
    """Completes an embedder's settings, and adds the record of how it was made."""

    def missed(self, progress: StageProgress, steps: int | None) -> list[int]:
        """Return the steps before ``progress`` without a model; ``steps`` is the stage's length.

        Raises:
            RecipeError: if a model is wanted after more steps than the stage has.
        """
        if steps is not None and max(self.steps, default=0) > steps:
            raise RecipeError(
                f"models_at is {', '.join(map(str, self.steps))}, but the stage has {steps} steps; "
                "give steps up to that"
            )
        behind = [step for step in self.steps if progress.finished or step < progress.step]
        return [step for step in behind if not (self.folder / str(step)).exists()]

    def keep(self, embedder: Embedder, step: int, record: Mapping[str, Any]) -> None:
        """Save a copy of the embedder, with low-rank updates merged."""
        model = deepcopy(embedder) if embedder.backbone.has_lora else copy(embedder)
        model.backbone.merge_lora()
        self.describe(model, record)
        if step == 0:  # it has not learned a teacher's space yet
            model.settings = replace(model.settings, shares_space_with=(), distilled_as=())
        model.save(self.folder / str(step))


def models_in(run: Path) -> dict[int, Path]:
    """Return the snapshots of a run by step, in order; empty if there are none."""
    folders = [*run.glob(f"{STEPS}/*"), *run.glob(f"[0-9]*-*/{STEPS}/*")]
    found = {int(path.name): path for path in folders if path.name.isdigit()}
    return dict(sorted(found.items()))
