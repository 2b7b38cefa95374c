"""Make a text embedder of your own from any pretrained transformer: train, measure, search.

The names below are the public interface. Each is imported when it is first used, so that
``import tercet`` costs next to nothing. Everything else is internal: it may change in any version.

Example:
    >>> from pathlib import Path
    >>> from tercet import Embedder, Example, finetune, open_source, train, write_examples
    >>> write_examples("pairs.jsonl", [Example("web server", ("nginx serves files",))])
    >>> train(finetune(model="minilm", steps=1), [open_source("pairs.jsonl")], Path("runs/mine"))
    >>> Embedder.load("runs/mine/model").encode(["a server for the web"], "query").shape
    (1, 384)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tercet.client import AsyncClient, Client
    from tercet.curate.mining.miner import Mining, mine
    from tercet.data.files.documents import Document, read_documents
    from tercet.data.files.examples import ExampleFields
    from tercet.data.files.folders import open_sources
    from tercet.data.files.sources import open_source, write_examples
    from tercet.data.files.texts import open_texts
    from tercet.errors import DataError, ModelError, RecipeError, ServerError, TercetError
    from tercet.evaluate.measures.by_kind import measure_kinds
    from tercet.evaluate.measures.retrieval import measure
    from tercet.evaluate.sets.retrieval_set import RetrievalSet
    from tercet.models.embedder import Embedder
    from tercet.models.pairs import score_pairs
    from tercet.models.quantize import quantized
    from tercet.rank.topk import top_k
    from tercet.recipes.arctic_embed import arctic_embed
    from tercet.recipes.bge_m3 import bge_m3
    from tercet.recipes.distil import distil
    from tercet.recipes.finetune import finetune
    from tercet.recipes.llm2vec import llm2vec
    from tercet.recipes.nv_embed import nv_embed
    from tercet.search.text_index import IndexOptions, index, open_index
    from tercet.training.loop import train
    from tercet.training.recipe import Run
    from tercet.types import Example

_MODULES: Final = {
    "AsyncClient": "tercet.client",
    "Client": "tercet.client",
    "DataError": "tercet.errors",
    "Document": "tercet.data.files.documents",
    "Embedder": "tercet.models.embedder",
    "Example": "tercet.types",
    "ExampleFields": "tercet.data.files.examples",
    "IndexOptions": "tercet.search.text_index",
    "Mining": "tercet.curate.mining.miner",
    "ModelError": "tercet.errors",
    "RecipeError": "tercet.errors",
    "RetrievalSet": "tercet.evaluate.sets.retrieval_set",
    "Run": "tercet.training.recipe",
    "ServerError": "tercet.errors",
    "TercetError": "tercet.errors",
    "arctic_embed": "tercet.recipes.arctic_embed",
    "bge_m3": "tercet.recipes.bge_m3",
    "distil": "tercet.recipes.distil",
    "finetune": "tercet.recipes.finetune",
    "index": "tercet.search.text_index",
    "llm2vec": "tercet.recipes.llm2vec",
    "measure": "tercet.evaluate.measures.retrieval",
    "measure_kinds": "tercet.evaluate.measures.by_kind",
    "mine": "tercet.curate.mining.miner",
    "nv_embed": "tercet.recipes.nv_embed",
    "open_index": "tercet.search.text_index",
    "open_source": "tercet.data.files.sources",
    "open_sources": "tercet.data.files.folders",
    "open_texts": "tercet.data.files.texts",
    "quantized": "tercet.models.quantize",
    "read_documents": "tercet.data.files.documents",
    "score_pairs": "tercet.models.pairs",
    "top_k": "tercet.rank.topk",
    "train": "tercet.training.loop",
    "write_examples": "tercet.data.files.sources",
}

__all__ = [
    "AsyncClient",
    "Client",
    "DataError",
    "Document",
    "Embedder",
    "Example",
    "ExampleFields",
    "IndexOptions",
    "Mining",
    "ModelError",
    "RecipeError",
    "RetrievalSet",
    "Run",
    "ServerError",
    "TercetError",
    "arctic_embed",
    "bge_m3",
    "distil",
    "finetune",
    "index",
    "llm2vec",
    "measure",
    "measure_kinds",
    "mine",
    "nv_embed",
    "open_index",
    "open_source",
    "open_sources",
    "open_texts",
    "quantized",
    "read_documents",
    "score_pairs",
    "top_k",
    "train",
    "write_examples",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'tercet' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return [*globals(), *_MODULES]
