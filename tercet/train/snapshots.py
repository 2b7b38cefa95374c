"""A series of models: a stage's embedder as it is after some of its steps, to be compared later."""

from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tercet.errors import RecipeError
from tercet.models.embedder import Embedder

STEPS: Final = "steps"  # the folder of a series; its folders are named by their steps

Describe = Callable[[Embedder, Mapping[str, Any]], None]
"""Gives an embedder what a stage does to its settings, and the record of how it was made."""


@dataclass(frozen=True, slots=True)
class Series:
    """After which steps of a stage its model is saved, and where."""

    folder: Path
    steps: tuple[int, ...]
    describe: Describe

    def check(self, steps: int) -> None:
        """Look whether a stage of so many steps comes to all of them.

        Raises:
            RecipeError: when a model is wanted after more steps than there are.
        """
        if max(self.steps, default=0) > steps:
            raise RecipeError(
                f"models_at is {', '.join(map(str, self.steps))}, but the stage has {steps} steps; "
                "give steps up to that"
            )

    def missing(self, steps: int | None = None) -> list[int]:
        """Those before so many steps whose model is not there; of None, all that are not."""
        before = [step for step in self.steps if steps is None or step < steps]
        return [step for step in before if not self.path(step).exists()]

    def path(self, step: int) -> Path:
        """The folder of the model after this step."""
        return self.folder / str(step)

    def keep(self, embedder: Embedder, step: int, record: Mapping[str, Any]) -> None:
        """Save the embedder as it is, with low-rank updates merged; the one in training stays."""
        model = deepcopy(embedder) if embedder.backbone.has_lora else copy(embedder)
        self.describe(model, record)
        model.save(self.path(step))


def models_in(run: Path) -> dict[int, Path]:
    """The models of a run's series by step, in order; of none, where there is no series."""
    folders = [*run.glob(f"{STEPS}/*"), *run.glob(f"[0-9]*-*/{STEPS}/*")]
    found = {int(path.name): path for path in folders if path.name.isdigit()}
    return dict(sorted(found.items()))
