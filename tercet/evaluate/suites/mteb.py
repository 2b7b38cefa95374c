"""Tasks of mteb 2 on a model of tercet.

mteb hands over batches of texts and says whether they are queries or documents. The model puts its
own prompt before each, once: those that mteb knows for a task are not used, since they would come
before ours. A document is its title, a space and its text, as in our evaluation folders. mteb has
no ad-hoc task of CLEF, which is licensed: convert your copy to BEIR's layout and evaluate that
folder.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from tercet.errors import MissingExtraError, RecipeError
from tercet.evaluate.measures.prompts import known_task, require_prompt
from tercet.models.embedder import Embedder
from tercet.types import Role

MIRACL: Final = "MIRACLRetrieval"
PRESETS: Final = {
    "beir": "the 15 free sets of BEIR, as in MTEB Retrieval",
    "miracl": "MIRACL in 18 languages",
    "miracl-o": "MIRACL in en, fr, es and de, the languages that Arctic-Embed 2.0 was trained for",
}
_ARCTIC: Final = ("eng", "fra", "spa", "deu")
_FIGURES: Final = {"ndcg@10": "ndcg_at_10", "recall@100": "recall_at_100"}


@dataclass(frozen=True, slots=True)
class TaskScore:
    """The score of one part of a task, such as a language; or why it was skipped."""

    task: str
    part: str = ""
    languages: tuple[str, ...] = ()
    split: str = ""
    revision: str = ""  # of the data
    figure: str = ""  # the task's main metric
    score: float = float("nan")
    more: tuple[tuple[str, float], ...] = ()  # nDCG@10 and Recall@100 of retrieval
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class MtebModel:
    """An embedder with the methods that mteb expects of an encoder."""

    embedder: Embedder
    mteb_model_meta: Any
    dims: int | None = None

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """Encode all texts of all batches; texts of unknown role count as queries.

        The prompts are those of the task if the model knows its name.

        Raises:
            RecipeError: if queries would get no prompt, although the model was trained with some.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        role: Role = "document" if str(getattr(prompt_type, "value", "")) == "document" else "query"
        settings = self.embedder.settings
        known = known_task(settings, (task_metadata.name,))
        require_prompt(settings, role, known, what=task_metadata.name)
        return self.embedder.encode(texts, role, task=known, dims=self.dims)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the inner product of every pair: a cosine for vectors of length one."""
        return _as_rows(embeddings1) @ _as_rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the inner product of each row with its counterpart."""
        return (_as_rows(embeddings1) * _as_rows(embeddings2)).sum(dim=1)


def as_mteb(embedder: Embedder, name: str, *, dims: int | None = None) -> MtebModel:
    """Return a model that mteb can run its tasks on.

    Raises:
        MissingExtraError: if mteb is not installed.
    """
    try:
        from mteb.models import ModelMeta
    except ImportError as error:
        raise MissingExtraError("a task of mteb", "mteb") from error
    settings = embedder.settings
    meta = ModelMeta(
        loader=None,
        name=f"tercet/{name.strip('/').replace('/', '_')}",
        revision=embedder.fingerprint(),
        release_date=None,
        languages=None,
        n_parameters=sum(weight.numel() for weight in embedder.parameters()),
        memory_usage_mb=None,
        max_tokens=max(settings.query_tokens, settings.document_tokens),
        embed_dim=dims or embedder.dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name="dot",  # pyright: ignore[reportArgumentType]
        use_instructions=bool(settings.prompts or settings.task_prompts),
        training_datasets=None,
    )
    return MtebModel(embedder, meta, dims)


def named_tasks(names: Sequence[str]) -> list[Any]:
    """Return the tasks of these names, which may be names of ``PRESETS``.

    Raises:
        MissingExtraError: if mteb is not installed.
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
            try:
                found.append(mteb.get_task(name))
            except KeyError as error:
                convert = " (convert your copy to BEIR's layout and evaluate the folder)"
                hint = convert if "clef" in name.lower() else ""
                raise RecipeError(
                    f"--mteb {name}: mteb has no task of this name{hint}; give one of its names, "
                    f"such as SciFact, or of {', '.join(PRESETS)}"
                ) from error
    return found


def run_tasks(model: MtebModel, tasks: Iterable[Any]) -> Iterator[TaskScore]:
    """Yield the scores of each task in turn.

    A task whose data are not here and cannot be fetched is skipped, and so are those after it:
    each would wait for a timeout. With ``HF_HUB_OFFLINE=1`` nothing waits, so each is tried.
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


def _as_rows(vectors: Any) -> Tensor:
    return torch.atleast_2d(torch.as_tensor(vectors, dtype=torch.float32))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
