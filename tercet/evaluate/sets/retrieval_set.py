"""Retrieval sets: queries, the documents to search, and which documents answer which query."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from tercet.data.files.beir import read_folder
from tercet.data.files.examples import ExampleFields
from tercet.data.files.inputs import local_path
from tercet.data.files.languages import named_pair
from tercet.data.files.sources import iter_examples
from tercet.errors import RecipeError
from tercet.files.forms import bare_name
from tercet.metrics import Judgements
from tercet.types import Example

METRICS: Final = ("ndcg@10", "recall@100", "mrr@10", "map@100")
ANSWER_METRICS: Final = ("answer@20", "answer@100")  # MKQA's Recall@20 and Recall@100


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    """Queries, the documents to search, and which documents answer which query."""

    name: str
    queries: tuple[str, ...]
    query_ids: tuple[str, ...]
    documents: tuple[str, ...]
    document_ids: tuple[str, ...]
    judgements: Judgements
    answers: tuple[tuple[str, ...], ...] = ()  # of each query; empty: only judgements count
    query_langs: tuple[str, ...] = ()  # of each query; an empty string or tuple: unknown
    document_langs: tuple[str, ...] = ()
    own_rows: np.ndarray | None = field(init=False, repr=False, compare=False)
    """[queries] int64: the document that has the query's id, or -1; None if no query has one."""

    def __post_init__(self) -> None:
        queries = frozenset(self.query_ids)
        same = {name: row for row, name in enumerate(self.document_ids) if name in queries}
        rows = [same.get(name, -1) for name in self.query_ids]
        object.__setattr__(self, "own_rows", np.array(rows, np.int64) if same else None)

    @classmethod
    def from_path(
        cls, path: Path | str, split: str | None = None, fields: ExampleFields | None = None
    ) -> "RetrievalSet":
        """Return the set of a file of examples, or of a folder of BEIR or FlagEmbedding.

        Raises:
            DataError: if it cannot be read.
            RecipeError: if a split of a file is requested.
        """
        path = local_path(path)
        if path.is_dir():
            return cls.from_folder(path, split)
        if split is not None:
            raise RecipeError(f"{path}: --split applies to folders only; remove it for a file")
        return cls.from_examples(path, fields=fields)

    @classmethod
    def from_examples(
        cls,
        source: Path | str | Iterable[Example],
        name: str | None = None,
        *,
        fields: ExampleFields | None = None,
    ) -> "RetrievalSet":
        """Build a set from training examples: positives are relevant, all texts are searched.

        Equal texts become one document and equal queries one query, so that a positive of one
        example is not counted as wrong for its duplicate. Ids are numbers in order of appearance,
        from 1, after ``q`` and ``d``. Prompts in the examples are ignored: the model's own are
        used. ``lang`` of an example is the language of its texts; ``ko-en`` means a Korean query
        and English documents.

        Raises:
            DataError: at the first record that is not an example, naming file and line.
        """
        from_file = isinstance(source, Path | str)
        examples = iter_examples(source, fields=fields) if from_file else source
        documents: dict[str, int] = {}
        relevant: dict[str, dict[int, int]] = {}
        query_langs: list[str] = []
        document_langs: list[str] = []
        for example in examples:
            query_lang, document_lang = _langs_of(example.lang)
            grades = relevant.setdefault(example.query, {})
            for text in example.positives:
                grades[documents.setdefault(text, len(documents))] = 1
            for text in example.negatives:
                documents.setdefault(text, len(documents))
            query_langs += [query_lang] * (len(relevant) - len(query_langs))  # of new ones
            document_langs += [document_lang] * (len(documents) - len(document_langs))
        return cls(
            name=name or (bare_name(local_path(source)) if from_file else "examples"),
            queries=tuple(relevant),
            query_ids=tuple(f"q{i}" for i in range(1, len(relevant) + 1)),
            documents=tuple(documents),
            document_ids=tuple(f"d{i}" for i in range(1, len(documents) + 1)),
            judgements=Judgements.of(list(relevant.values())),
            query_langs=tuple(query_langs),
            document_langs=tuple(document_langs),
        )

    @classmethod
    def from_folder(cls, folder: Path | str, split: str | None = None) -> "RetrievalSet":
        """Read a folder of BEIR or FlagEmbedding; see :mod:`tercet.data.files.beir`.

        Only queries that this split judges are kept, in the order of their file.

        Raises:
            DataError: if the split is missing or ambiguous, and at the first line that cannot be
                read or names an unknown id.
        """
        found = read_folder(folder, split)
        return cls(
            name=Path(folder).name,
            queries=tuple(found.queries.values()),
            query_ids=tuple(found.queries),
            documents=tuple(found.documents.values()),
            document_ids=tuple(found.documents),
            judgements=Judgements.of([found.grades.get(name, {}) for name in found.queries]),
            answers=tuple(found.answers[name] for name in found.queries) if found.answers else (),
            query_langs=found.query_langs,
            document_langs=found.document_langs,
        )

    @property
    def size(self) -> str:
        """The number of queries and documents, for people, and what rankings leave out."""
        whole = f"{len(self.queries):,} queries, {len(self.documents):,} documents"
        if not self.left_out:
            return whole
        return f"{whole}; the document of the same id is left out of {self.left_out:,} rankings"

    @property
    def left_out(self) -> int:
        """The number of queries that are documents too, which their own rankings leave out.

        BEIR does the same, whether or not the document is judged (ArguAna, Quora).
        """
        return 0 if self.own_rows is None else int((self.own_rows >= 0).sum())

    def depth(self, ranks: int) -> int:
        """Return how many hits to ask for, so that enough remain without the own document."""
        return ranks + (self.own_rows is not None)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that can be measured: of judgements, of answers, or of both."""
        if not self.answers:
            return METRICS
        return (*METRICS, *ANSWER_METRICS) if len(self.judgements.docs) else ANSWER_METRICS

    def require_judgements(self, use: str) -> None:
        """Check that documents are judged, so that the set has more than answers.

        Raises:
            RecipeError: naming the use that needs judgements.
        """
        if not len(self.judgements.docs) and self.answers:
            raise RecipeError(
                f"{self.name}: its queries have answers but no judged documents, which {use} "
                "needs; add judgements (qrels)"
            )


def _langs_of(lang: str) -> tuple[str, str]:
    """Return the languages of an example's query and of its documents."""
    query, documents = named_pair(lang) if "-" in lang else (lang, lang)
    return (query, documents) if query else (lang, lang)
