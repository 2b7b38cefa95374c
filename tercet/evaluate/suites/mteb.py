"""Tasks of mteb on a model of ours: where the hub can be reached, and said so where it cannot.

mteb has no ad-hoc task of CLEF, which is licensed: put a copy of yours in the layout of BEIR and
evaluate that folder.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tercet.errors import MissingExtraError, RecipeError
from tercet.evaluate.measures.prompts import known_task, require_prompt
from tercet.evaluate.suites.mteb_encoder import About, MtebModel
from tercet.models.embedder import Embedder
from tercet.types import Role

MIRACL: Final = "MIRACLRetrieval"
PRESETS: Final = {
    "beir": "the 15 sets of BEIR that are free, as MTEB Retrieval has them",
    "miracl": "MIRACL in 18 languages",
    "miracl-o": "MIRACL in en, fr, es and de, the languages that Arctic-Embed 2.0 was trained for",
}
_ARCTIC: Final = ("eng", "fra", "spa", "deu")
_FIGURES: Final = {"ndcg@10": "ndcg_at_10", "recall@100": "recall_at_100"}


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What a task says of a part of it, such as a language; or why it was left out."""

    task: str
    part: str = ""
    languages: tuple[str, ...] = ()
    split: str = ""
    revision: str = ""  # of the data
    figure: str = ""  # the task's main one
    score: float = float("nan")
    more: tuple[tuple[str, float], ...] = ()  # nDCG@10 and Recall@100 of retrieval
    skipped: str = ""


def named_tasks(names: Sequence[str]) -> list[Any]:
    """The tasks of these names, of which some may be names of ``PRESETS``.

    Raises:
        MissingExtraError: when mteb is not installed.
        RecipeError: for a task that mteb does not know.
    """
    try:
        import mteb
    except ImportError as error:
        raise MissingExtraError("a task of mteb", "mteb") from error
    found: list[Any] = []
    for name in names:
        if name == "beir":
            found += mteb.get_benchmark("BEIR").tasks
        elif name == "miracl":
            found.append(mteb.get_task(MIRACL))
        elif name == "miracl-o":
            found.append(mteb.get_task(MIRACL, languages=list(_ARCTIC)))
        else:
            found.append(_task(mteb.get_task, name))
    return found


def _task(find: Callable[[str], Any], name: str) -> Any:
    try:
        return find(name)
    except KeyError as error:
        hint = (
            " (put your copy in BEIR's layout and evaluate the folder)"
            if "clef" in name.lower()
            else ""
        )
        raise RecipeError(
            f"--mteb {name}: mteb has no task of this name{hint}; give one of its names, such as "
            f"SciFact, or of {', '.join(PRESETS)}"
        ) from error


def as_mteb(embedder: Embedder, name: str, *, dims: int | None = None) -> MtebModel:
    """The model as mteb wants one, with its prompts for a task where it knows the task's name.

    Raises:
        MissingExtraError: when mteb is not installed.
        RecipeError: at a task for which queries would get no prompt, though it learned some.
    """
    settings = embedder.settings

    def encode(texts: list[str], role: Role, task: str) -> np.ndarray:
        known = known_task(settings, (task,))
        require_prompt(settings, role, known, what=task)
        return embedder.encode(texts, role, task=known, dims=dims)

    about = About(
        name,
        embedder.fingerprint(),
        sum(weight.numel() for weight in embedder.parameters()),
        max(settings.query_tokens, settings.document_tokens),
        dims or embedder.dim,
        settings.prompts or settings.task_prompts,
    )
    return MtebModel(encode, about)


def run_tasks(model: MtebModel, tasks: Iterable[Any]) -> Iterator[TaskScore]:
    """What each task says of the model, in turn.

    A task whose data are not here and cannot be fetched is skipped, and those after it too: each
    would wait in vain. With ``HF_HUB_OFFLINE=1`` nobody waits, and all that are here are run.
    """
    away = ""
    for task in tasks:
        name = task.metadata.name
        if not away:
            try:
                task.load_data()
            except (ConnectionError, TimeoutError) as error:
                away = f"the hub cannot be reached ({_first_line(error)})"
        if away:
            yield TaskScore(name, skipped=away)
            away = "" if os.environ.get("HF_HUB_OFFLINE") else away
            continue
        yield from _run(model, task)


def _run(model: MtebModel, task: Any) -> Iterator[TaskScore]:
    import mteb

    found = mteb.evaluate(model, task, cache=None, show_progress_bar=False)  # pyright: ignore
    for result in found.task_results:
        for split, parts in result.scores.items():
            for part in parts:
                yield TaskScore(
                    result.task_name,
                    part["hf_subset"],
                    tuple(part["languages"]),
                    split,
                    result.dataset_revision,
                    task.metadata.main_score,
                    float(part["main_score"]),
                    tuple((ours, part[its]) for ours, its in _FIGURES.items() if its in part),
                )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
