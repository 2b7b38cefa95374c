"""Means over languages and families, so that a language with many queries counts as any other.

A language of an axis has the mean of its sets, each of equal weight. The mean over families is that
of the means of their languages: five Romance languages are one voice there. Intervals take the
errors of different sets to be independent. Where sets are about the same things (translations),
they are not, and the true interval of a mean over languages is wider.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float64

from tercet.data.files.languages import family_of, plain
from tercet.evaluate.report.intervals import Interval, interval
from tercet.evaluate.suites.languages import Axis, SetScores
from tercet.evaluate.suites.suite import average

Values: TypeAlias = Callable[[SetScores], Float64[np.ndarray, "queries"]]
"""A number for each query of a set."""

AXES: Final[tuple[Axis, ...]] = ("monolingual", "cross-lingual", "mixed")


@dataclass(frozen=True, slots=True)
class Averages:
    """Figures of one axis, or differences of figures. The axes are never averaged together."""

    languages: Mapping[str, Interval]  # of the queries
    families: Mapping[str, Interval]
    over_languages: Interval
    over_families: Interval
    worst: str  # the language with the lowest figure, or the largest loss
    seen: Interval | None  # over the languages that training had; None: there are none, or unknown
    unseen: Interval | None

    def rows(self) -> Iterator[tuple[str, Interval, str]]:
        """What a table shows of it: a name, the figure, and the language that it is of, if one."""
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
    """The sets of each group and axis, the axes in their usual order; untold ones are left out."""
    found = list(sets)
    groups = sorted({each.group for each in found})
    chosen: dict[tuple[str, Axis], list[SetScores]] = {
        (group, axis): [each for each in found if (each.group, each.axis) == (group, axis)]
        for group in groups
        for axis in AXES
    }
    return {place: some for place, some in chosen.items() if some}


def averages(
    cells: Iterable[tuple[str, Interval]], *, seen: Sequence[str] | None = None
) -> Averages:
    """Averages over figures of one axis, each of a language; of these there is one or more.

    ``seen`` are languages that the training had, whatever their country; None: not told.
    """
    grouped: dict[str, list[Interval]] = {}
    for lang, figure in cells:
        grouped.setdefault(lang, []).append(figure)
    languages = {lang: _mean(grouped[lang]) for lang in sorted(grouped)}
    members: dict[str, list[Interval]] = {}
    for lang, figure in languages.items():
        members.setdefault(family_of(lang), []).append(figure)
    families = {family: _mean(members[family]) for family in sorted(members)}
    known = {plain(lang) for lang in seen or ()}
    parts: dict[bool, list[Interval]] = {True: [], False: []}
    for lang, figure in languages.items():
        parts[plain(lang) in known].append(figure)
    told = seen is not None
    return Averages(
        languages,
        families,
        _mean(list(languages.values())),
        _mean(list(families.values())),
        min(languages, key=lambda lang: languages[lang].mean),
        _mean(parts[True]) if told and parts[True] else None,
        _mean(parts[False]) if told and parts[False] else None,
    )


def _mean(figures: Sequence[Interval]) -> Interval:
    """Their average; one alone keeps the interval that it has."""
    return figures[0] if len(figures) == 1 else average(figures)


def cells_of(
    sets: Sequence[SetScores], values: Values, *, seed: int = 0
) -> Iterator[tuple[str, Interval]]:
    """The figure of each language of each set."""
    for each in sets:
        numbers = values(each)
        for lang in dict.fromkeys(each.langs):
            yield lang, interval(numbers[each.of(lang)], seed=seed)


def differences(
    after: Sequence[SetScores], before: Sequence[SetScores], metric: str, *, seed: int = 0
) -> Iterator[tuple[str, Interval]]:
    """By how much a model is better, query by query, for each language of each set."""
    other = {each.name: each.scores[metric] for each in before}
    return cells_of(after, lambda each: each.scores[metric] - other[each.name], seed=seed)


@dataclass(frozen=True, slots=True)
class Bias:
    """How far a model prefers documents in the query's own language to those that answer it.

    ``bias`` is ``same`` minus ``chance``. Queries of which nothing was found are left out of it.
    """

    figure: Interval  # the metric, over all of the queries
    own: Interval  # over those with a relevant document in their own language
    other: Interval  # over those without one
    same: float  # share of the first 10 that is in the query's language
    chance: float  # share of the corpus that is
    bias: Interval


def language_bias(
    each: SetScores, metric: str, *, lang: str | None = None, seed: int = 0
) -> Bias | None:
    """The bias over all queries of a set, or over those in a language; None: there are none."""
    chosen = np.ones(len(each.langs), bool) if lang is None else each.of(lang)
    found = chosen & ~np.isnan(each.same)
    if not found.any():
        return None
    scores = each.scores[metric]
    return Bias(
        interval(scores[chosen], seed=seed),
        interval(scores[chosen & each.own], seed=seed),
        interval(scores[chosen & ~each.own], seed=seed),
        float(each.same[found].mean()),
        float(each.chance[found].mean()),
        interval(each.bias[found], seed=seed),
    )
