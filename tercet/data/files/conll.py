"""Sentences with a label per word: CoNLL columns, CoNLL-U, or records of tokens."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from tercet.data.files.examples import as_object, nonblank, shown, text_of
from tercet.data.files.inputs import local_path
from tercet.errors import DataError, RecipeError
from tercet.files.forms import RECORDS, TABLES, is_of
from tercet.files.records import FileRecord, iter_records, line_records, parsed

UNLABELLED: Final = "_"  # a word that is encoded, but neither trained on nor counted

_TOKENS, _LABELS = "tokens", "labels"
_DOCUMENT_BORDER: Final = "-DOCSTART-"
_CONLLU_COLUMNS: Final = 10
_CONLLU_ID = re.compile(r"\d+(?:[-.]\d+)?")
_FORM, _UPOS = 2, 4  # columns of CoNLL-U, from 1


@dataclass(frozen=True, slots=True)
class LabelledSentence:
    """Words and the label of each; ``UNLABELLED`` if it has none."""

    words: tuple[str, ...]
    labels: tuple[str, ...]


class _Row(NamedTuple):
    line: int
    columns: list[str]  # empty for a blank line, which ends a sentence


def read_labelled(path: Path | str, column: int | None = None) -> list[LabelledSentence]:
    """Return the labelled sentences of a file, in order.

    A .jsonl or .parquet file has records ``{"tokens": [...], "labels": [...]}``. Any other file
    has one word per line and a blank line after each sentence; columns are separated by tabs if
    the first line has one, or else by white space. The word is in the first column, its label in
    ``column``, counted from 1; without it, in the last. Lines of ``-DOCSTART-`` are skipped.

    Ten columns with a number in the first are CoNLL-U: the word is FORM, the label UPOS, comments
    and the numbers of multiword and empty tokens (``3-4``, ``5.1``) are skipped.

    Raises:
        DataError: at the first invalid line, naming it.
        RecipeError: for a ``column`` that cannot hold labels, or for a file without columns.
    """
    path = local_path(path)
    if is_of(path, RECORDS) and not is_of(path, TABLES):  # a .tsv has a word a line
        if column is not None:
            raise RecipeError(f"{path} has no columns; remove the column of the labels")
        fields = (_TOKENS, _LABELS)
        records = iter_records(path, fields, needs=fields, known=())
        return [parsed(path, record, _of_record) for record in records]
    sentences = list(_sentences(path, _rows(path), column))
    if not sentences:
        raise DataError(path, None, "holds no sentences; write a word and its label per line")
    return sentences


def _rows(path: Path) -> list[_Row]:
    """Return the columns of each line; comments are removed from CoNLL-U only."""
    lines = [(it.line, parsed(path, it, lambda it: str(it.value))) for it in line_records(path)]
    beginnings = ("#", _DOCUMENT_BORDER)
    first = next((it for _, it in lines if it.strip() and not it.startswith(beginnings)), "")
    skipped = beginnings if _is_conllu(first.split("\t")) else _DOCUMENT_BORDER
    return [
        _Row(number, _columns(line, tabs="\t" in first))
        for number, line in lines
        if not line.startswith(skipped)
    ]


def _columns(line: str, *, tabs: bool) -> list[str]:
    if not line.strip():
        return []
    return line.split("\t") if tabs else [part for part in line.split(" ") if part]


def _is_conllu(columns: list[str]) -> bool:
    return len(columns) == _CONLLU_COLUMNS and _CONLLU_ID.fullmatch(columns[0]) is not None


def _sentences(path: Path, rows: list[_Row], column: int | None) -> Iterator[LabelledSentence]:
    first = next((row for row in rows if row.columns), None)
    if first is None:
        return
    width, conllu = len(first.columns), _is_conllu(first.columns)
    word_at = _FORM if conllu else 1
    label_at = column or (_UPOS if conllu else width)
    if column == word_at or (column is not None and column < 1):
        raise RecipeError(f"column {column} cannot hold labels; give a later one, counted from 1")
    if width < 2 or label_at > width:
        problem = f"has only {width} columns; there is no column {max(label_at, 2)}"
        raise DataError(path, first.line, f"{problem}, which would hold the label")
    words: list[str] = []
    labels: list[str] = []
    for row in rows:
        if row.columns:
            if len(row.columns) != width:
                problem = f"has {len(row.columns)} columns, but line {first.line} has {width}"
                raise DataError(path, row.line, f"{problem}; give each word the same columns")
            if conllu and not row.columns[0].isdecimal():
                continue
            words.append(_filled(path, row, word_at))
            labels.append(_filled(path, row, label_at))
        elif words:
            yield LabelledSentence(tuple(words), tuple(labels))
            words, labels = [], []
    if words:
        yield LabelledSentence(tuple(words), tuple(labels))


def _filled(path: Path, row: _Row, column: int) -> str:
    value = row.columns[column - 1]
    if not value.strip():
        problem = f'column {column} is blank; write "{UNLABELLED}" for a word without a label'
        raise DataError(path, row.line, problem)
    return value


def _of_record(record: FileRecord) -> LabelledSentence:
    fields = as_object(record.value)
    words, labels = (_listed(fields.get(name), name) for name in (_TOKENS, _LABELS))
    if len(words) != len(labels):
        raise ValueError(
            f'"{_LABELS}" has {len(labels)} entries for {len(words)} words in "{_TOKENS}"; '
            "give one label for each word, null for none"
        )
    if not words:
        raise ValueError(f'"{_TOKENS}" is empty; a sentence needs a word')
    return LabelledSentence(
        tuple(nonblank(text_of(word, _TOKENS), _TOKENS) for word in words),
        tuple(
            UNLABELLED if label is None else nonblank(text_of(label, _LABELS), _LABELS)
            for label in labels
        ),
    )


def _listed(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f'"{name}" must be a list of texts, got {shown(value)}')
    return value
