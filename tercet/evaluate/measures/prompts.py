"""Which of a model's prompts an evaluation uses.

A task that the model has prompts for is measured with those; any other with its default prompts. A
model that was trained with prompts is not measured fairly without: if it has no default ones,
``tercet eval`` raises unless ``--no-prompts`` is given, and functions warn.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from tercet.data.files.examples import ExampleFields
from tercet.data.files.sources import iter_examples
from tercet.errors import RecipeError
from tercet.files.console import shortened
from tercet.files.forms import bare_name
from tercet.models.embedder import Embedder, Settings
from tercet.models.settings import named_prompts
from tercet.types import Role

log = logging.getLogger("tercet")

_SHOWN = 5  # prompts that a warning quotes


def task_names(
    data: Path, *, examples: bool = False, fields: ExampleFields | None = None
) -> tuple[str, ...]:
    """Return names under which a model may know the task of evaluation data, the best one first.

    For ``examples`` that is the task that all of its records name, then the name of the path.
    """
    named = {example.task for example in iter_examples(data, fields=fields)} if examples else set()
    return (*(named if len(named) == 1 else ()), bare_name(data))


def known_task(settings: Settings, names: Sequence[str]) -> str | None:
    """Return the first of these names that is a task the model has prompts for."""
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
    """Return vectors of texts that all get the prompt of one role, since none is searched.

    A task without a prompt for this role uses the default one.

    Raises:
        RecipeError: if the model has no prompts for the task.
    """
    settings = embedder.settings
    if task is not None:
        settings.prompt(role, task)  # raises for an unknown task
        task = task if role in settings.task_prompts[task] else None
    warn_unprompted(settings, role, task)
    return embedder.encode(texts, role, task=task, dims=dims, progress=progress)


def warn_unprompted(settings: Settings, role: Role, task: str | None) -> None:
    """Log if texts of this role get no prompt, although the model was trained with some."""
    if _unprompted(settings, role, task):
        log.warning(
            "a %s gets no prompt, but the model was trained with some, so its figures may be too "
            "low; name one of its tasks (--task, or task=): %s",
            role,
            _known(settings),
        )


def require_prompt(settings: Settings, role: Role, task: str | None, *, what: str) -> None:
    """Check that texts of this role get a prompt, if the model was trained with some.

    Raises:
        RecipeError: naming the prompts, and how to measure without one.
    """
    if _unprompted(settings, role, task):
        raise RecipeError(
            f"{what}: a {role} gets no prompt, but the model was trained with some; name one of "
            f"its tasks (--task), or measure without prompts (--no-prompts): {_known(settings)}"
        )


def _unprompted(settings: Settings, role: Role, task: str | None) -> bool:
    learned = [settings.prompts, *settings.task_prompts.values()]
    return task is None and not settings.prompt(role) and any(each.get(role) for each in learned)


def drop_prompts(embedder: Embedder) -> None:
    """Remove a model's prompts, to measure it without, and log which ones they were."""
    settings = embedder.settings
    embedder.settings = replace(settings, prompts={}, task_prompts={})
    if any(True for _ in named_prompts(settings)):
        log.warning(
            "measured without prompts, as requested, but the model was trained with some: %s",
            _known(settings),
        )


def _known(settings: Settings) -> str:
    """Return the model's prompts by role, or by task and role, for a message."""
    known = [f"{name} {shortened(prompt)!r}" for name, prompt in named_prompts(settings)]
    more = len(known) - _SHOWN
    return ", ".join(known[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
