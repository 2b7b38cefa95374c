"""The rules on all pairs of some sources, and which pairs are left, by source and language.

A unit is a run of rows, so that a killed run goes on; its result is 25 bytes a pair in a file.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Int8, Int32, Int64, UInt64

from tercet.curate.filtering.pair_rules import DUPLICATE, KEPT, RULES, PairRules
from tercet.curate.jobs.job import DoUnit, UnitReport, WorkUnit, run_units
from tercet.curate.jobs.runners import LOOP, Runner
from tercet.curate.mining.documents import text_key
from tercet.data.files.sources import Source
from tercet.files.atomic import replacing_file
from tercet.files.records import readable

ROWS: Final = 1 << 16  # of a unit
_AT_ONCE: Final = 4096  # rows that are objects at the same time
_VERSION: Final = 1  # of what a file of a unit says
_CODES: Final = {reason: code for code, reason in enumerate((KEPT, *RULES))}


@dataclass(frozen=True, slots=True)
class Key:
    """A source and a language of it: what is filtered, counted and mixed as one."""

    source: str
    lang: str  # "" where rows do not tell

    @property
    def base(self) -> str:
        """The name of the source without the language: ``news`` of ``news/de``."""
        return self.source.removesuffix(f"/{self.lang}") if self.lang else self.source

    @property
    def folder(self) -> str:
        """Where its files go, such as ``news/lang=de``."""
        return f"{self.base}/lang={quote(self.lang, safe='')}" if self.lang else self.base


@dataclass(frozen=True, slots=True, eq=False)
class Screened:
    """All pairs of a key, in the order of the source, and which rule each of them breaks."""

    key: Key
    rows: Int64[np.ndarray, "pairs"]  # of the source, from 0
    positives: Int32[np.ndarray, "pairs"]  # which of the row's, from 0
    reasons: Int8[np.ndarray, "pairs"]  # 0: none
    texts: UInt64[np.ndarray, "pairs"]  # keys of documents; equal texts have equal ones

    @property
    def left(self) -> Bool[np.ndarray, "pairs"]:
        """The pairs that break no rule."""
        return self.reasons == _CODES[KEPT]

    @property
    def dropped(self) -> dict[str, int]:
        """How many pairs each rule dropped."""
        counts = np.bincount(self.reasons, minlength=len(_CODES)).tolist()
        return {rule: counts[_CODES[rule]] for rule in RULES}

    def reason(self, code: int) -> str:
        """The rule of this number."""
        return (KEPT, *RULES)[code]


@dataclass(frozen=True, slots=True, kw_only=True)
class Screening:
    """The job of asking the rules about each pair of some sources."""

    sources: Mapping[str, Source]  # by name
    rules: PairRules
    work: Path
    name: str = "rules"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the verdicts hang on, besides the texts."""
        return {"version": _VERSION, "rules": asdict(self.rules)}

    def open(self) -> DoUnit:
        """Nothing is loaded."""
        return self._screen

    @property
    def units(self) -> list[WorkUnit]:
        """Runs of rows of each source."""
        return [
            WorkUnit(
                f"{name}/{start // ROWS:06}",
                {"source": source.fingerprint, "start": start, "of": name},
                size=min(ROWS, len(source) - start),
            )
            for name, source in self.sources.items()
            for start in range(0, len(source), ROWS)
        ]

    def path(self, unit: WorkUnit) -> Path:
        """Where the verdicts of a unit are."""
        told = json.dumps([self.settings, unit.reads], sort_keys=True)
        digest = hashlib.blake2b(told.encode(), digest_size=12).hexdigest()
        return self.work / "rules" / f"{digest}.npz"

    def _screen(self, unit: WorkUnit) -> UnitReport:
        source, langs = self.sources[unit.reads["of"]], dict[str, int]()
        columns: dict[str, list[int]] = {name: [] for name in _TYPES}
        start = unit.reads["start"]
        for first in range(start, start + unit.size, _AT_ONCE):
            rows = range(first, min(first + _AT_ONCE, start + unit.size))
            for row, example in zip(rows, source.examples(rows), strict=True):
                count = len(example.positives)
                asked = text_key(example.query)
                keys = [text_key(text) for text in example.positives]
                broken = self.rules.broken(example.query, example.positives, example.lang)
                columns["rows"] += [row] * count
                columns["positives"] += range(count)
                columns["reasons"] += [_CODES[rule] for rule in broken]
                columns["texts"] += keys
                columns["pairs"] += [_pair_key(asked, key) for key in keys]
                columns["langs"] += [langs.setdefault(example.lang, len(langs))] * count
        with replacing_file(self.path(unit)) as fresh, fresh.open("wb") as file:
            arrays: Any = {name: np.array(columns[name], kind) for name, kind in _TYPES.items()}
            np.savez(file, **arrays)
        return {"langs": list(langs)}


_TYPES: Final = {
    "rows": np.int64,
    "positives": np.int32,
    "reasons": np.int8,
    "texts": np.uint64,
    "pairs": np.uint64,
    "langs": np.int32,
}


def screened(screening: Screening, manifest: Path, runner: Runner = LOOP) -> Iterator[Screened]:
    """The pairs of each source and language, and the rules that they break, duplicates too.

    Of equal pairs of a key the first one that breaks no other rule stays.

    Raises:
        DataError: when a source has changed since it was opened.
        StorageError: when the disk refuses.
    """
    waiting: list[tuple[WorkUnit, UnitReport]] = []
    for unit, report in run_units(screening, screening.units, manifest, runner=runner):
        if waiting and waiting[0][0].reads["of"] != unit.reads["of"]:
            yield from _of_source(screening, waiting)
            waiting = []
        waiting.append((unit, report))
    if waiting:
        yield from _of_source(screening, waiting)


def _of_source(
    screening: Screening, units: Sequence[tuple[WorkUnit, UnitReport]]
) -> Iterator[Screened]:
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
        if DUPLICATE in screening.rules.asked:
            own["reasons"][_repeats(own["pairs"], own["reasons"])] = _CODES[DUPLICATE]
        yield Screened(
            Key(units[0][0].reads["of"], lang),
            own["rows"],
            own["positives"],
            own["reasons"],
            own["texts"],
        )


def _repeats(
    pairs: UInt64[np.ndarray, "pairs"], reasons: Int8[np.ndarray, "pairs"]
) -> Int64[np.ndarray, "repeats"]:
    """The places of pairs that came before, among those that break no rule."""
    left = np.flatnonzero(reasons == _CODES[KEPT])
    _, first = np.unique(pairs[left], return_index=True)
    return np.delete(left, first)


def _pair_key(query: int, document: int) -> int:
    both = query.to_bytes(8, "little") + document.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(both, digest_size=8).digest(), "little")
