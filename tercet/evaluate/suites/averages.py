"""Means over languages and families, so that a language with many queries counts like any other.

The figure of a language on an axis is the mean of its sets, with equal weights. The mean over
families is that of the means of their languages, so that five Romance languages do not count five
times. Intervals assume that the errors of different sets are independent. For sets about the same
contents (translations) they are not, and the true interval of a mean over languages is wider.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float64

from tercet.data.files.languages import family_of, plain
from tercet.evaluate.report.intervals import Interval, interval
from tercet.evaluate.suites.by_language import Axis, SetScores
from tercet.evaluate.suites.suite import average

QueryValues: TypeAlias = Callable[[SetScores], Float64[np.ndarray, "queries"]]
"""A function that returns a number for each query of a set."""

AXES: Final[tuple[Axis, ...]] = ("monolingual", "cross-lingual", "mixed")


@dataclass(frozen=True, slots=True)
class Averages:
    """Figures of one axis, or differences of figures. Axes are never averaged together."""

    languages: Mapping[str, Interval]  # of the queries
    families: Mapping[str, Interval]
    over_languages: Interval
    over_families: Interval
    worst: str  # the language with the lowest figure, or the largest loss
    seen: Interval | None  # over the languages seen in training; None: there are none, or unknown
    unseen: Interval | None

    def rows(self) -> Iterator[tuple[str, Interval, str]]:
        """Yield rows of a table: a name, the figure, and the language if it is of one."""
        yield "mean of languages", self.over_languages, ""
        yield "mean of families", self.over_families, ""
        yield "worst language", self.languages[self.worst], self.worst
        if self.seen is not None:
            yield "languages seen in training", self.seen, ""
        if self.unseen is not None:
            yield "languages not seen", self.unseen, ""
        for family, figure in self.families.items():
            yield family, figure, ""


def by_axis(sets: Iterable[SetScores]) -> dict[tuple[str, Axis], list[SetScores]]:
    """Group sets by group and axis, in the order of ``AXES``; unknown languages are left out."""
    found = list(sets)
    chosen: dict[tuple[str, Axis], list[SetScores]] = {
        (group, axis): [each for each in found if (each.group, each.axis) == (group, axis)]
        for group in sorted({each.group for each in found})
        for axis in AXES
    }
    return {place: some for place, some in chosen.items() if some}


def averages(
    cells: Iterable[tuple[str, Interval]], *, seen: Sequence[str] | None = None
) -> Averages:
    """Average one or more figures of one axis, each of a language.

    ``seen`` are languages that the training had, in any country; None: unknown.
    """
    languages = _mean_by(str, cells)
    families = _mean_by(family_of, languages.items())
    known = {plain(lang) for lang in seen or ()}
    parts: dict[bool, list[Interval]] = {True: [], False: []}
    for lang, figure in languages.items():
        parts[plain(lang) in known].append(figure)
    return Averages(
        languages,
        families,
        average(list(languages.values())),
        average(list(families.values())),
        min(languages, key=lambda lang: languages[lang].mean),
        average(parts[True]) if seen is not None and parts[True] else None,
        average(parts[False]) if seen is not None and parts[False] else None,
    )


def _mean_by(
    group_of: Callable[[str], str], cells: Iterable[tuple[str, Interval]]
) -> dict[str, Interval]:
    grouped: dict[str, list[Interval]] = {}
    for name, figure in cells:
        grouped.setdefault(group_of(name), []).append(figure)
    return {name: average(grouped[name]) for name in sorted(grouped)}


def cells_of(
    sets: Sequence[SetScores], values: QueryValues, *, seed: int = 0
) -> Iterator[tuple[str, Interval]]:
    """Yield each language of each set with its figure."""
    for each in sets:
        numbers = values(each)
        for lang in dict.fromkeys(each.langs):
            yield lang, interval(numbers[each.of(lang)], seed=seed)


def differences(
    after: Sequence[SetScores], before: Sequence[SetScores], metric: str, *, seed: int = 0
) -> Iterator[tuple[str, Interval]]:
    """Yield each language of each set with the paired difference of two models."""
    other = {each.name: each.scores[metric] for each in before}
    return cells_of(after, lambda each: each.scores[metric] - other[each.name], seed=seed)


@dataclass(frozen=True, slots=True)
class LanguageBias:
    """How far a model prefers documents in the query's own language to those that answer it.

    ``bias`` is ``same`` minus ``chance``, without queries for which nothing was found.
    """

    figure: Interval  # the metric, over all of the queries
    own: Interval  # over those with a relevant document in their own language
    other: Interval  # over those without one
    same: float  # share of the first 10 that is in the query's language
    chance: float  # share of the corpus that is
    bias: Interval


def language_bias(
    each: SetScores, metric: str, *, lang: str | None = None, seed: int = 0
) -> LanguageBias | None:
    """Return the bias over all queries of a set, or over those in a language; None if none."""
    chosen = np.ones(len(each.langs), bool) if lang is None else each.of(lang)
    found = chosen & ~np.isnan(each.same)
    if not found.any():
        return None
    scores = each.scores[metric]
    return LanguageBias(
        interval(scores[chosen], seed=seed),
        interval(scores[chosen & each.own], seed=seed),
        interval(scores[chosen & ~each.own], seed=seed),
        float(each.same[found].mean()),
        float(each.chance[found].mean()),
        interval(each.bias[found], seed=seed),
    )
