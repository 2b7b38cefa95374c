"""Which of a model's prompts an evaluation uses, and a word where it uses none.

A model that learned with prompts is another one without them, so a figure measured that way says
little of it. A task that the model has prompts for is measured with those; anything else with its
default prompts. Where there are none, the verb ``eval`` refuses to measure, unless it is told to
drop the prompts; a function warns.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from tercet.data.files.sources import iter_examples
from tercet.errors import RecipeError
from tercet.files.console import shortened
from tercet.models.embedder import Embedder, Settings
from tercet.models.settings import named_prompts
from tercet.types import Role

log = logging.getLogger("tercet")

_SHOWN = 5  # prompts that a warning quotes


def task_names(data: Path, *, examples: bool = False) -> tuple[str, ...]:
    """Names that a file or folder of evaluation data goes by, the best one first.

    Of ``examples``, that is the task that all of its records name, if they name one.
    """
    named = {example.task for example in iter_examples(data)} if examples else set()
    return (*(named if len(named) == 1 else ()), data.stem)


def known_task(settings: Settings, names: Sequence[str]) -> str | None:
    """The first of these names that is a task the model has prompts for."""
    return next((name for name in names if name in settings.task_prompts), None)


def encode_alike(
    embedder: Embedder,
    texts: Sequence[str],
    role: Role = "query",
    *,
    task: str | None = None,
    dims: int | None = None,
    progress: bool = False,
) -> Float32[np.ndarray, "texts dim"]:
    """Vectors of texts of which none is searched, so that all get the prompt of one role.

    A task without a prompt for this role takes the default one.

    Raises:
        RecipeError: for a task that the model has no prompts for.
    """
    settings = embedder.settings
    if task is not None:
        settings.prompt(role, task)  # refuses an unknown one
        task = task if role in settings.task_prompts[task] else None
    warn_unprompted(settings, role, task)
    return embedder.encode(texts, role, task=task, dims=dims, progress=progress)


def warn_unprompted(settings: Settings, role: Role, task: str | None) -> None:
    """Say so where texts of this role get no prompt, though the model has learned some for them.

    A task whose prompt is empty is right without one.
    """
    if _unprompted(settings, role, task):
        log.warning(
            "a %s gets no prompt, but the model was trained with some, so its figures may be too "
            "low; name a task of its (--task, or task=): %s",
            role,
            _known(settings),
        )


def require_prompt(settings: Settings, role: Role, task: str | None, *, what: str) -> None:
    """Check that texts of this role get a prompt, if the model has learned some for them.

    Raises:
        RecipeError: naming the prompts, and how to measure without one all the same.
    """
    if _unprompted(settings, role, task):
        raise RecipeError(
            f"{what}: a {role} gets no prompt, but the model was trained with some; name a task of "
            "its (--task), or measure without prompts all the same (--no-prompts): "
            f"{_known(settings)}"
        )


def _unprompted(settings: Settings, role: Role, task: str | None) -> bool:
    learned = [settings.prompts, *settings.task_prompts.values()]
    return task is None and not settings.prompt(role) and any(each.get(role) for each in learned)


def drop_prompts(embedder: Embedder) -> None:
    """Take a model's prompts away, to see what they are worth, and say which ones these were."""
    settings = embedder.settings
    embedder.settings = replace(settings, prompts={}, task_prompts={})
    if any(True for _ in named_prompts(settings)):
        log.warning(
            "measured without prompts, as asked, but the model was trained with some: %s",
            _known(settings),
        )


def _known(settings: Settings) -> str:
    """The model's prompts, by role, or by task and role."""
    known = [f"{name} {shortened(prompt)!r}" for name, prompt in named_prompts(settings)]
    more = len(known) - _SHOWN
    return ", ".join(known[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
