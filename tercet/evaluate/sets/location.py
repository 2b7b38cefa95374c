"""Where evaluation sets are: the format of a path, and the retrieval sets inside a folder."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from tercet.data.files.beir import is_judged_folder
from tercet.data.files.inputs import local_path
from tercet.data.files.labelled import is_labelled_file
from tercet.data.files.languages import named_pair
from tercet.data.files.similarity import is_similarity_file
from tercet.errors import DataError
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.forms import RECORDS, bare_name, is_of

SetFormat: TypeAlias = Literal["retrieval folder", "examples", "labelled texts", "scored pairs"]


def format_of(path: Path) -> SetFormat:
    """Return the format of one evaluation set; whether it can be read is found out later."""
    path = local_path(path)
    if path.is_dir():
        return "retrieval folder"
    if is_similarity_file(path):
        return "scored pairs"
    return "labelled texts" if is_labelled_file(path) else "examples"


@dataclass(frozen=True, slots=True)
class SetLocation:
    """A retrieval set in a folder of sets: ``clef/de`` is the set ``de`` of the group ``clef``."""

    name: str
    group: str  # sets of different groups are not averaged together; empty: no group
    path: Path

    def open(self, split: str | None = None) -> RetrievalSet:
        """Read the set; the language of a query or document is its own, or that of the file name.

        Raises:
            DataError: if it cannot be read.
            RecipeError: if no documents are judged.
        """
        data = RetrievalSet.from_path(self.path, split if self.path.is_dir() else None)
        data.require_judgements("its figures by language")
        of_queries, of_documents = named_pair(bare_name(self.path))
        return replace(
            data,
            name=self.name,
            query_langs=tuple(lang or of_queries for lang in data.query_langs),
            document_langs=tuple(lang or of_documents for lang in data.document_langs),
        )


def sets_in(folder: Path) -> list[SetLocation]:
    """Return the retrieval sets of a folder of sets, by name; empty if it is a set or a file.

    Files of other formats (labelled texts, scored pairs) are left out.

    Raises:
        DataError: for two sets of one name.
    """
    if not folder.is_dir() or is_judged_folder(folder):
        return []
    found = [SetLocation(bare_name(path), "", path) for path in _retrieval_sets(folder)]
    groups = (path for path in folder.iterdir() if path.is_dir() and not is_judged_folder(path))
    for group in sorted(groups):
        found += [
            SetLocation(f"{group.name}/{bare_name(path)}", group.name, path)
            for path in _retrieval_sets(group)
        ]
    for name, count in Counter(each.name for each in found).items():
        if count > 1:
            raise DataError(folder, None, f"holds {count} sets of the name {name}; rename one")
    return sorted(found, key=lambda each: each.name)


def _retrieval_sets(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.iterdir())
        if is_judged_folder(path)
        or (is_of(path, RECORDS) and path.is_file() and format_of(path) == "examples")
    ]
