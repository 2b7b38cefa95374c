"""Under which conditions figures were measured: what stands beside them in a file."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from tercet.evaluate.measures.retention import Stored
from tercet.models.embedder import Embedder

_PACKAGES: Final = ("tercet", "torch", "transformers", "tokenizers", "numpy")


def conditions(
    embedder: Embedder, *, dims: int | None = None, stored: Stored | None = None
) -> dict[str, Any]:
    """How a model read its texts: length limits, prompts, pooling, and how its vectors were kept.

    A figure without its length limits cannot be compared: what was cut was not searched.
    """
    settings = embedder.settings
    return {
        "query_tokens": settings.query_tokens,
        "document_tokens": settings.document_tokens,
        "prompts": dict(settings.prompts),
        "task_prompts": {task: dict(each) for task, each in settings.task_prompts.items()},
        "suffixes": dict(settings.suffixes),
        "pooling": settings.pooling,
        "attention": embedder.backbone.attention,
        "dims": embedder.dim if dims is None else dims,
        "weights": str(next(embedder.parameters()).dtype).removeprefix("torch."),
        "stored": stored or "float32",
    }


def versions(*more: str) -> dict[str, str]:
    """Of the packages that figures depend on, as far as they are installed."""
    found: dict[str, str] = {}
    for name in (*_PACKAGES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
