"""A model of ours as mteb 2 wants one, so that its tasks can be run on it.

mteb hands over batches of texts and says whether they are queries or documents. The model puts its
own prompt before each, once: those that mteb knows for a task are not used, since they would be put
before ours. A document is its title, a space and its text, as in our evaluation folders.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from tercet.errors import MissingExtraError
from tercet.types import Role

Encode: TypeAlias = Callable[[list[str], Role, str], np.ndarray]
"""Vectors of texts that have this role in the task of this name."""


@dataclass(frozen=True, slots=True)
class About:
    """What mteb keeps of a model beside its results."""

    name: str
    revision: str  # other weights, prompts or lengths have another one
    parameters: int
    max_tokens: int
    dim: int
    prompts: Mapping[str, Any]


class MtebModel:
    """What mteb calls an encoder: vectors of batches of texts, and how alike two of them are."""

    def __init__(self, encode: Encode, about: About) -> None:
        self._encode = encode
        self._about = about
        self.mteb_model_meta = _meta(about)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """Vectors of all texts of all batches; a text that is neither is taken for a query."""
        texts = [text for batch in inputs for text in batch["text"]]
        role: Role = "document" if str(getattr(prompt_type, "value", "")) == "document" else "query"
        return self._encode(texts, role, task_metadata.name)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """The inner product of every pair, a cosine where the model makes vectors of length one."""
        return _as_rows(embeddings1) @ _as_rows(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """The inner product of each row with its counterpart."""
        return (_as_rows(embeddings1) * _as_rows(embeddings2)).sum(dim=1)


def _as_rows(vectors: Any) -> Tensor:
    return torch.atleast_2d(torch.as_tensor(vectors, dtype=torch.float32))


def _meta(about: About) -> Any:
    """What mteb writes down of the model.

    Raises:
        MissingExtraError: when mteb is not installed.
    """
    try:
        from mteb.models import ModelMeta
    except ImportError as error:
        raise MissingExtraError("a task of mteb", "mteb") from error
    return ModelMeta(
        loader=None,
        name=f"tercet/{about.name.strip('/').replace('/', '_')}",
        revision=about.revision,
        release_date=None,
        languages=None,
        n_parameters=about.parameters,
        memory_usage_mb=None,
        max_tokens=about.max_tokens,
        embed_dim=about.dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name="dot",  # pyright: ignore[reportArgumentType]
        use_instructions=bool(about.prompts),
        training_datasets=None,
    )
