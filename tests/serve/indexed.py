"""Indexes of the tests of search over HTTP."""

from pathlib import Path
from typing import Any

from tercet.data.files.documents import Document
from tercet.search.text_index import IndexOptions, index
from tests.toy import SENTENCES

DOCUMENTS = [
    Document(f"d{i}", text, f"Title {i}", {"lang": ["en", "de"][i % 2], "year": 2000 + i})
    for i, text in enumerate(SENTENCES)
]


def make_index(
    folder: Path, model: Path, documents: list[Document] | None = None, **options: Any
) -> Path:
    """Index some documents, as ``tercet index`` does."""
    index(
        DOCUMENTS if documents is None else documents, str(model), folder, IndexOptions(**options)
    )
    return folder


def found(answer: Any) -> list[list[str]]:
    """Return the ids of the hits of each query."""
    assert answer.status_code == 200, answer.text
    return [[hit["id"] for hit in result["hits"]] for result in answer.json()["results"]]


def document(name: str, text: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "text": text, **more}
