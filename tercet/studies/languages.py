"""Evaluation sets by language, and which languages a model has seen."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tercet.data.files.languages import family_of
from tercet.data.files.sources import Source, iter_examples
from tercet.errors import DataError, RecipeError
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.suite import EvaluationSet, as_evaluation_set
from tercet.types import Example

_CODE = re.compile(r"[a-z]{2,3}([_-][A-Z][A-Za-z]+)*")  # such as de, pt_BR, zh-Hans


@dataclass(frozen=True, slots=True)
class Language:
    """A language, the set that measures a model in it, and whether the model was trained on it."""

    name: str
    seen: bool
    data: RetrievalSet
    examined: EvaluationSet  # the same, behind the face of all sets

    @property
    def family(self) -> str:
        """The family that it belongs to."""
        return family_of(self.name)


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of each set is used; None: all of it."""

    queries: int | None = None  # the first ones
    documents: int | None = None  # those that answer these queries, and the first of the others

    def __post_init__(self) -> None:
        for name in ("queries", "documents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}; give 1 or more")


def open_languages(
    paths: Sequence[Path], seen: Sequence[str], budget: Budget | None = None
) -> list[Language]:
    """A set for each language of these files, or of the files in these folders, seen ones first.

    A row's language is the one that it names, or else the name of its file.

    Raises:
        DataError: when a row is no example, or its language is not told.
        RecipeError: when there is no set, or none for a language that is said to be seen.
    """
    rows: dict[str, list[Example]] = {}
    names: dict[str, list[str]] = {}
    for path in _files(paths):
        for number, example in enumerate(iter_examples(path), start=1):
            lang = example.lang or path.stem
            if not _CODE.fullmatch(lang):
                raise DataError(
                    path,
                    number,
                    f'it names no language, and {lang!r} is none; give rows a "lang", or name '
                    "the file by its language, such as de.jsonl",
                )
            rows.setdefault(lang, []).append(example)
            names.setdefault(lang, []).extend(
                name for name in (example.task, path.stem) if name not in names[lang]
            )
    if not rows:
        raise RecipeError("there is no evaluation set; give a folder of LANG.jsonl files")
    known = {_plain(lang) for lang in rows} | {_base(lang) for lang in rows}
    for lang in seen:
        if _plain(lang) not in known:
            raise RecipeError(
                f"{lang!r} is said to be seen, but no evaluation set is in it (there are "
                f"{', '.join(rows)}); add one, or leave it out of --seen"
            )
    said = {_plain(lang) for lang in seen}
    found = []
    for lang, examples in rows.items():
        data = RetrievalSet.from_examples(_within(examples, budget or Budget()), lang)
        examined = as_evaluation_set(data, tuple(name for name in names[lang] if name))
        examined = replace(examined, fingerprint=_fingerprint(data))
        found.append(Language(lang, {_plain(lang), _base(lang)} & said != set(), data, examined))
    return sorted(found, key=lambda each: (not each.seen, each.family, each.name))


def language_of(source: Source) -> str:
    """The language of all examples of a source, or that of its file's name; empty of several."""
    if source.lang or source.path.is_dir():
        return source.lang
    told = {example.lang for example in iter_examples(source.path)}
    return source.path.stem if told == {""} else told.pop() if len(told) == 1 else ""


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.glob("*") if p.suffix in (".jsonl", ".parquet"))
        if path.is_dir() and not inside:
            raise RecipeError(f"{path}: holds no .jsonl or .parquet file of examples")
        found += inside if path.is_dir() else [path]
    return found


def _within(rows: Sequence[Example], budget: Budget) -> list[Example]:
    """The rows of the first queries, and as many other documents as there is room for."""
    queries = list(dict.fromkeys(row.query for row in rows))[: budget.queries]
    chosen = set(queries)
    kept = [row for row in rows if row.query in chosen]
    relevant = dict.fromkeys(text for row in kept for text in row.positives)
    others = dict.fromkeys(text for row in rows for text in (*row.positives, *row.negatives))
    rest = [text for text in others if text not in relevant]
    if budget.documents is not None:
        rest = rest[: max(0, budget.documents - len(relevant))]
    bare = [replace(row, negatives=(), negative_scores=None) for row in kept]
    return [*bare[:-1], replace(bare[-1], negatives=tuple(rest))]


def _fingerprint(data: RetrievalSet) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for texts in (data.queries, data.documents):
        _add(digest, texts)
    for array in (data.judgements.docs, data.judgements.grades, data.judgements.offsets):
        digest.update(array.astype("<i8").tobytes())
    return digest.hexdigest()


def _add(digest: "hashlib.blake2b", texts: Iterable[str]) -> None:
    for text in texts:
        digest.update(text.encode() + b"\x00")
    digest.update(b"\x01")


def _plain(lang: str) -> str:
    return lang.replace("-", "_").lower()


def _base(lang: str) -> str:
    """Without a country or script: zh of zh_CN."""
    return _plain(lang).partition("_")[0]
