"""Folders of BEIR and FlagEmbedding: documents, queries and judgements, as a set or as examples.

- BEIR: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv`` (or ``.jsonl``), or one file
  ``qrels.jsonl`` or ``qrels.tsv`` whatever the split.
- FlagEmbedding: ``corpus.jsonl``, ``SPLIT_queries.jsonl`` and ``SPLIT_qrels.jsonl``.

Each file may be packed (``.gz``, ``.zst``).

Ids are ``_id`` or ``id``; judgements name them ``query-id`` or ``qid``, ``corpus-id`` or ``docid``,
and their grade ``score`` or ``relevance``. Instead of judged documents a query may have
``answers``, texts of which a document must contain one: in its own record, or with its ``qid`` in
the file of judgements, as FlagEmbedding writes MKQA. Queries and documents may have a ``lang``.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from tercet.data.files.examples import LANG, as_object, nonblank, shown, text_of
from tercet.errors import DataError
from tercet.files.atomic import clear_about
from tercet.files.forms import known_form
from tercet.files.records import FileRecord, begins_with, decoded, iter_lines, iter_records, parsed

_ID: Final = ("_id", "id")
_QUERY_ID: Final = ("qid", "query-id", "query_id")
_DOCUMENT_ID: Final = ("docid", "corpus-id", "doc_id")
_GRADE: Final = ("relevance", "score")
_ANSWERS: Final = ("answers",)
_USUAL: Final = "test"  # split of BEIR's sets
_TRAIN: Final = "train"
_PACKED: Final = ("", ".gz", ".zst")  # endings of each file
_HIGHEST: Final = 1_000_000  # grade; a higher number cannot be one

_UNJUDGED: Final = (
    f"has no judgements; add qrels/{_USUAL}.tsv, qrels.jsonl, qrels.tsv or "
    f'{_USUAL}_qrels.jsonl, or "answers" to each query'
)

GradesByQuery: TypeAlias = dict[str, dict[int, int]]
"""By query id, then by the row of a document."""
AnswersByQuery: TypeAlias = Mapping[str, tuple[str, ...]]
"""By query id: texts of which a document must contain one."""
Value = TypeVar("Value")

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True)
class Folder:
    """The contents of one split. Queries that it does not judge are left out."""

    documents: Mapping[str, str]  # by id, in the order of their file
    queries: Mapping[str, str]
    grades: Mapping[str, Mapping[int, int]]  # by query id, then by the row of a document
    answers: AnswersByQuery  # of all queries, or empty
    document_langs: tuple[str, ...]  # an empty string: unknown
    query_langs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _SplitFiles:
    """The files of one split."""

    queries: Path
    judgements: Path | None  # None: the queries have answers instead


def read_folder(folder: Path | str, split: str | None = None) -> Folder:
    """Read the documents of a folder, and the queries of a split with their judgements.

    A document is its title, a space, and its text. ``split`` defaults to the only one, or to
    ``test`` in BEIR's layout.

    Raises:
        DataError: if the split is missing or ambiguous, and at the first line that cannot be read
            or names an unknown id.
    """
    folder = Path(folder)
    corpus = corpus_of(folder)
    files = _files_of(folder, split)
    known = dict(_by_id(corpus, _ID, lambda it: (_document_text(it), _lang(it))))
    documents = {name: text for name, (text, _) in known.items()}
    read = dict(_by_id(files.queries, _ID, lambda it: (_query_text(it), _answers(it), _lang(it))))
    answers = {name: given for name, (_, given, _) in read.items() if given}
    grades: GradesByQuery = {}
    path = files.judgements
    if path is not None and _is_lines(path) and begins_with(path, _ANSWERS):
        answers = dict(_by_id(path, _QUERY_ID, _needed_answers))
        _refuse_unknown(path, answers, read, files.queries)
    elif path is not None:
        grades = _grades(path, files.queries, read, corpus, documents)
    judged = grades or answers
    if not judged:
        raise DataError(folder, None, _UNJUDGED)
    queries = {name: text for name, (text, *_) in read.items() if name in judged}
    return Folder(
        documents,
        queries,
        grades,
        _of_all(answers, queries, files.queries),
        tuple(lang for _, lang in known.values()),
        tuple(read[name][2] for name in queries),
    )


def _files_of(folder: Path, split: str | None) -> _SplitFiles:
    found = _splits(folder)
    if split in found:
        return found[split]
    names = sorted(name for name in found if name is not None)
    if not names:  # one file for all splits
        return found[None]
    if split is None:
        if len(names) == 1:
            return found[names[0]]
        if (folder / "qrels").is_dir() and _USUAL in found:
            return found[_USUAL]
    known = ", ".join(names)
    raise DataError(
        folder,
        None,
        f"has the splits {known}; name one (--split)"
        if split is None
        else f"has no split {split!r}; name one of its splits (--split): {known}",
    )


def _splits(folder: Path) -> dict[str | None, _SplitFiles]:
    """Return the files of each split; None stands for all splits."""
    found: dict[str | None, _SplitFiles] = {}
    for packed in _PACKED:
        for part in ("queries", "qrels"):
            for path in folder.glob(f"*_{part}.jsonl{packed}"):
                split = path.name.removesuffix(f"_{part}.jsonl{packed}")
                judgements = _first(folder / f"{split}_qrels.jsonl")
                queries = _first(folder / f"{split}_queries.jsonl")
                found[split] = _SplitFiles(queries, judgements if judgements.is_file() else None)
    queries = _first(folder / "queries.jsonl")
    for suffix in (".tsv", ".jsonl"):
        for packed in _PACKED:
            for path in folder.glob(f"qrels/*{suffix}{packed}"):
                name = path.name.removesuffix(f"{suffix}{packed}")
                known = found.get(name)
                if known is None or known.judgements is None:
                    found[name] = _SplitFiles(queries if known is None else known.queries, path)
    for name in ("qrels.jsonl", "qrels.tsv"):
        if (path := _first(folder / name)).is_file():
            found.setdefault(None, _SplitFiles(queries, path))
    return found or {None: _SplitFiles(queries, None)}


def _first(path: Path) -> Path:
    """Return the file of this name, or the packed one; the name where none is there."""
    places = (path.with_name(path.name + packed) for packed in _PACKED)
    return next((place for place in places if place.is_file()), path)


def _is_lines(path: Path) -> bool:
    form = known_form(path)
    return form is not None and form.kind == "jsonl"


def is_judged_folder(path: Path) -> bool:
    """Whether a folder has some of the files of one set, even if others are missing."""
    return path.is_dir() and (
        _first(path / "corpus.jsonl").exists()
        or _first(path / "queries.jsonl").exists()
        or (path / "qrels").exists()
        or any(path.glob("*qrels.*"))
    )


def corpus_of(folder: Path) -> Path:
    """Return the file of the documents of a folder.

    Raises:
        DataError: if there is none.
    """
    corpus = _first(folder / "corpus.jsonl")
    if not corpus.is_file():
        raise DataError(corpus, None, "no such file; a folder of queries and judgements has one")
    return corpus


def training_files(folder: Path) -> tuple[Path, Path, Path]:
    """Return the files of documents, of queries and of the judgements for training.

    Raises:
        DataError: if one of them is missing.
    """
    corpus, splits = corpus_of(folder), _splits(folder)
    files = splits.get(_TRAIN) or (splits[None] if list(splits) == [None] else None)
    if files is None or files.judgements is None:
        there = sorted(name for name in splits if name is not None)
        known = f"; it has those of {', '.join(there)}, which are for evaluation" if there else ""
        raise DataError(
            folder, None, f"has no judgements to train on; add qrels/{_TRAIN}.tsv{known}"
        )
    if not files.queries.is_file():
        raise DataError(files.queries, None, "no such file; a folder of judgements has one")
    return corpus, files.queries, files.judgements


def training_records(folder: Path) -> Iterator[FileRecord]:
    """Yield an example for each query that the training split judges, in the order of its file.

    Documents with a grade above zero are its positives, others that are judged its negatives. Of
    the documents, only ids of judged ones are in memory; their texts pass through a temporary
    file. Blank documents are left out, and so is a query without a positive.

    Raises:
        DataError: at the first line that cannot be read or names an unknown id.
    """
    corpus, queries, path = training_files(folder)
    grades: dict[str, dict[str, int]] = {}
    for _, query, document, grade in _judgements(path):
        grades.setdefault(query, {})[document] = grade
    if not grades:
        raise DataError(path, None, "holds no judgements; write: query id, document id, grade")
    asked, left_out, offset = set[str](), 0, 0
    with clear_about(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
        texts = _JudgedTexts(file, corpus, {name for them in grades.values() for name in them})
        if texts.missing:
            _refuse_missing(path, texts.missing, corpus, document=True)
        lines = _by_id(queries, _ID, lambda it: (_query_text(it), _lang(it)), grades)
        for number, (name, (query, lang)) in enumerate(lines, start=1):
            asked.add(name)
            record: dict[str, Any] = {
                "query": query,
                "positives": texts.of(it for it, grade in grades[name].items() if grade > 0),
                "negatives": texts.of(it for it, grade in grades[name].items() if grade <= 0),
            }
            if not record["positives"]:
                left_out += 1
                continue
            content = json.dumps({**record, "lang": lang or None}, ensure_ascii=False).encode()
            yield FileRecord(
                number, offset, number / (len(grades) + 1), content, json.loads(content)
            )
            offset += len(content) + 1
    _refuse_missing(path, grades.keys() - asked, queries, document=False)
    if texts.blank:
        log.warning("%s: %d judged documents are blank, and are left out", folder, texts.blank)
    if left_out:
        log.warning("%s: %d queries have no document above 0: left out", folder, left_out)
    if not offset:
        raise DataError(path, None, "judges no document above 0; nothing can be learned from it")


class _JudgedTexts:
    """The texts of judged documents, in a temporary file."""

    def __init__(self, file: Any, corpus: Path, judged: set[str]) -> None:
        self._file = file
        self._places: dict[str, int] = {}
        self._blanks: set[str] = set()
        for name, text in _by_id(corpus, _ID, _document_text, judged):
            if not text or text.isspace():
                self._blanks.add(name)
                continue
            self._places[name] = file.tell()
            file.write(json.dumps(text).encode() + b"\n")
        self.blank, self.missing = len(self._blanks), judged - self._places.keys() - self._blanks

    def of(self, names: Iterable[str]) -> list[str]:
        """Return the texts of these documents, without blank ones."""
        found: list[str] = []
        for name in names:
            if name not in self._blanks:
                self._file.seek(self._places[name])
                found.append(json.loads(self._file.readline()))
        return found


def _refuse_missing(path: Path, missing: Collection[str], file: Path, *, document: bool) -> None:
    """Raise for the first line that names one of the missing ids."""
    for line, *names, _ in _judgements(path) if missing else ():
        if names[document] in missing:
            raise _unknown_id(path, line, names[document], file)


def _unknown_id(path: Path, line: int, name: str, file: Path) -> DataError:
    return DataError(path, line, f"id {name!r} is not in {file.name}; add it or drop this line")


def _grades(
    path: Path, queries: Path, known: Collection[str], corpus: Path, documents: Collection[str]
) -> GradesByQuery:
    """Return the judgements of a file, after checking that every id is known."""
    row_of = {name: row for row, name in enumerate(documents)}
    grades: GradesByQuery = {}
    for line, query, document, grade in _judgements(path):
        for name, names, file in ((query, known, queries), (document, row_of, corpus)):
            if name not in names:
                raise _unknown_id(path, line, name, file)
        grades.setdefault(query, {})[row_of[document]] = grade
    return grades


def _refuse_unknown(path: Path, given: Collection[str], known: Collection[str], of: Path) -> None:
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        raise DataError(path, None, f"id {unknown!r} is not in {of.name}; add it or drop its line")


def _of_all(answers: AnswersByQuery, queries: Collection[str], path: Path) -> AnswersByQuery:
    """Return the answers of these queries, after checking that all of them have some, or none."""
    without = [name for name in queries if name not in answers]
    if len(without) == len(queries):
        return {}
    if without:
        raise DataError(
            path,
            None,
            f'query {without[0]!r} has no "answers", but others have; add them to all, or to none',
        )
    return {name: answers[name] for name in queries}


def _by_id(
    path: Path,
    ids: Sequence[str],
    value: Callable[[Mapping[str, Any]], Value],
    wanted: Collection[str] | None = None,
) -> Iterator[tuple[str, Value]]:
    """Yield the id and value of each record that is wanted, and check that ids are unique."""
    seen: set[str] = set()

    def entry(record: FileRecord) -> tuple[str, Value] | None:
        fields = as_object(record.value)
        name = _id_of(fields, ids)
        if wanted is not None and name not in wanted:
            return None
        if name in seen:
            raise ValueError(f"id {name!r} occurs twice; ids must be unique")
        seen.add(name)
        return name, value(fields)

    for record in iter_records(path, (), needs=()):
        if (found := parsed(path, record, entry)) is not None:
            yield found


def judged_documents(folder: Path) -> Iterator[FileRecord]:
    """Yield the documents of a folder as records of ``id`` and ``text``, which has the title."""

    def joined(record: FileRecord) -> dict[str, Any]:
        fields = as_object(record.value)
        return {"id": _id_of(fields, _ID), "text": _document_text(fields)}

    corpus = corpus_of(folder)
    for record in iter_records(corpus, (), needs=()):
        yield replace(record, value=parsed(corpus, record, joined))


def _document_text(fields: Mapping[str, Any]) -> str:
    title = text_of(fields.get("title") or "", "title")
    return f"{title} {text_of(fields.get('text'), 'text')}".strip()


def _lang(fields: Mapping[str, Any]) -> str:
    """Return the language that a record names, or an empty string."""
    named = (fields[name] for name in LANG if isinstance(fields.get(name), str))
    return sys.intern(next(named, ""))


def _query_text(fields: Mapping[str, Any]) -> str:
    return nonblank(text_of(fields.get("text"), "text"), "text")


def _answers(fields: Mapping[str, Any]) -> tuple[str, ...]:
    (name,) = _ANSWERS
    given = fields.get(name)
    if given is None:
        return ()
    if not isinstance(given, str | list):
        raise ValueError(f'"{name}" must be a list of texts, got {shown(given)}')
    texts = [given] if isinstance(given, str) else given
    return tuple(nonblank(text_of(text, name), name) for text in texts)


def _needed_answers(fields: Mapping[str, Any]) -> tuple[str, ...]:
    if found := _answers(fields):
        return found
    raise ValueError('"answers" is missing or empty; each query needs one or more')


def _judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Yield line, query id, document id and grade, from .jsonl or tab-separated columns."""
    if _is_lines(path):
        for record in iter_records(path, (), needs=()):
            yield record.line, *parsed(path, record, _judgement)
        return
    for number, offset, content in iter_lines(path):
        try:
            columns = decoded(content, offset).split("\t")
            if not content.strip() or (number == 1 and columns[-1].strip() in _GRADE):
                continue  # BEIR's files begin with the names of the columns
            if len(columns) != 3:
                raise ValueError(
                    f"must have 3 columns (query id, document id, grade) with tabs between; "
                    f"got {len(columns)}"
                )
            yield number, columns[0], columns[1], _grade(columns[2])
        except ValueError as error:
            raise DataError(path, number, str(error)) from error


def _judgement(record: FileRecord) -> tuple[str, str, int]:
    fields = as_object(record.value)
    grade = next((fields[name] for name in _GRADE if name in fields), None)
    return _id_of(fields, _QUERY_ID), _id_of(fields, _DOCUMENT_ID), _grade(grade)


def _id_of(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the id under the first of its names that is present; a whole number as digits."""
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return nonblank(text_of(value, names[0]), names[0])


def _grade(value: object) -> int:
    try:
        number = float(value) if isinstance(value, str | int | float) else np.nan
    except (ValueError, OverflowError):
        number = np.nan
    if not number.is_integer() or abs(number) > _HIGHEST:
        raise ValueError(f'"{_GRADE[0]}" must be a whole number, got {shown(value)}')
    return int(number)
