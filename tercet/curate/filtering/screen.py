"""Applying the rules to all pairs of some sources, by source and language.

A unit of work is a run of rows; its result is a file with 25 bytes per pair, so that a run that was
killed continues.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64, UInt64

from tercet.curate.filtering.pair_rules import DUPLICATE, KEPT, RULES, PairRules
from tercet.curate.jobs.job import DoUnit, UnitReport, WorkUnit, run_units
from tercet.curate.jobs.runners import LOOP, Runner
from tercet.data.files.sources import Source
from tercet.data.files.texts import text_key
from tercet.files.artifacts import fingerprint, fingerprint_number, write_arrays
from tercet.files.records import readable

ROWS: Final = 1 << 16  # of a unit
_AT_ONCE: Final = 4096  # rows that are objects at the same time
_VERSION: Final = 1  # of the files of units
_CODES: Final = {reason: code for code, reason in enumerate((KEPT, *RULES))}


@dataclass(frozen=True, slots=True)
class SourceLanguage:
    """A language of a source: its pairs are filtered, counted and mixed together."""

    source: str
    lang: str  # "" for rows that name no language

    @property
    def base(self) -> str:
        """The name of the source without the language: ``news`` of ``news/de``."""
        return self.source.removesuffix(f"/{self.lang}") if self.lang else self.source

    @property
    def folder(self) -> str:
        """The folder of its files, such as ``news/lang=de``."""
        return f"{self.base}/lang={quote(self.lang, safe='')}" if self.lang else self.base


@dataclass(frozen=True, slots=True, eq=False)
class ScreenedPairs:
    """All pairs of a source and language, in file order, with the rule that each breaks."""

    key: SourceLanguage
    rows: Int64[np.ndarray, "pairs"]  # of the source, from 0
    positives: Int32[np.ndarray, "pairs"]  # of the row, from 0
    reasons: Int8[np.ndarray, "pairs"]  # 0: breaks no rule; else the rule's place in RULES, from 1
    texts: UInt64[np.ndarray, "pairs"]  # keys of documents, equal for equal texts

    @property
    def left(self) -> Bool[np.ndarray, "pairs"]:
        """The pairs that break no rule."""
        return self.reasons == _CODES[KEPT]

    @property
    def dropped(self) -> dict[str, int]:
        """How many pairs each rule dropped."""
        counts = np.bincount(self.reasons, minlength=len(_CODES)).tolist()
        return dict(zip(RULES, counts[1:], strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreenJob:
    """The job of applying the rules to each pair of some sources."""

    sources: Mapping[str, Source]  # by name
    rules: PairRules
    work: Path
    name: str = "rules"

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the verdicts depend on, besides the texts."""
        return {"version": _VERSION, "rules": asdict(self.rules)}

    def open(self) -> DoUnit:
        """Return the function that screens a unit."""
        return self._screen

    @property
    def units(self) -> list[WorkUnit]:
        """The runs of rows of each source."""
        return [
            WorkUnit(
                f"{name}/{start // ROWS:06}",
                {"source": source.fingerprint, "start": start, "of": name},
                size=min(ROWS, len(source) - start),
            )
            for name, source in self.sources.items()
            for start in range(0, len(source), ROWS)
        ]

    def files(self, unit: WorkUnit) -> Sequence[Path]:
        """Return the file with the verdicts of a unit."""
        return [self.path(unit)]

    def path(self, unit: WorkUnit) -> Path:
        """Return the file with the verdicts of a unit."""
        about = json.dumps([self.settings, unit.reads], sort_keys=True)
        return self.work / "rules" / f"{fingerprint(about, size=12)}.npz"

    def _screen(self, unit: WorkUnit) -> UnitReport:
        source, langs = self.sources[unit.reads["of"]], dict[str, int]()
        columns: dict[str, list[int]] = {name: [] for name in _TYPES}
        start = unit.reads["start"]
        for first in range(start, start + unit.size, _AT_ONCE):
            rows = range(first, min(first + _AT_ONCE, start + unit.size))
            for row, example in zip(rows, source.examples(rows), strict=True):
                count = len(example.positives)
                query = text_key(example.query)
                keys = [text_key(text) for text in example.positives]
                broken = self.rules.broken(example.query, example.positives, example.lang)
                columns["rows"] += [row] * count
                columns["positives"] += range(count)
                columns["reasons"] += [_CODES[rule] for rule in broken]
                columns["texts"] += keys
                columns["pairs"] += [_pair_key(query, key) for key in keys]
                columns["langs"] += [langs.setdefault(example.lang, len(langs))] * count
        arrays = {name: np.array(columns[name], kind) for name, kind in _TYPES.items()}
        write_arrays(self.path(unit), arrays)
        return {"langs": list(langs)}


_TYPES: Final = {
    "rows": np.int64,
    "positives": np.int32,
    "reasons": np.int8,
    "texts": np.uint64,
    "pairs": np.uint64,
    "langs": np.int32,
}
_OF_PAIRS: Final = ("rows", "positives", "reasons", "texts")


def screen_sources(
    screening: ScreenJob, manifest: Path, runner: Runner = LOOP
) -> Iterator[ScreenedPairs]:
    """Yield the pairs of each source and language with the rules that they break.

    Of equal pairs of a source and language, the first that breaks no other rule stays.
    """
    done = run_units(screening, screening.units, manifest, runner=runner)
    for _, units in groupby(done, lambda pair: pair[0].reads["of"]):
        yield from _by_language(screening, list(units))


def _by_language(
    screening: ScreenJob, units: Sequence[tuple[WorkUnit, UnitReport]]
) -> Iterator[ScreenedPairs]:
    langs: dict[str, int] = {}
    parts: dict[str, list[np.ndarray]] = {name: [] for name in _TYPES}
    for unit, report in units:
        codes = np.array([langs.setdefault(each, len(langs)) for each in report["langs"]])
        path = screening.path(unit)
        with readable(path), np.load(path) as found:
            for name in _TYPES:
                parts[name].append(codes[found[name]] if name == "langs" else found[name])
    columns = {name: np.concatenate(found) for name, found in parts.items()}
    for lang, code in langs.items():
        here = columns["langs"] == code
        own = {name: columns[name][here] for name in _TYPES}
        if DUPLICATE in screening.rules.applied:
            own["reasons"][_duplicates(own["pairs"], own["reasons"])] = _CODES[DUPLICATE]
        key = SourceLanguage(units[0][0].reads["of"], lang)
        yield ScreenedPairs(key, *(own[name] for name in _OF_PAIRS))


def _duplicates(
    pairs: UInt64[np.ndarray, "pairs"], reasons: Int8[np.ndarray, "pairs"]
) -> Int64[np.ndarray, "duplicates"]:
    """Return the places of later copies of pairs, among those that break no rule."""
    left = np.flatnonzero(reasons == _CODES[KEPT])
    _, first = np.unique(pairs[left], return_index=True)
    return np.delete(left, first)


def _pair_key(query: int, document: int) -> int:
    return fingerprint_number(query.to_bytes(8, "little") + document.to_bytes(8, "little"))
