"""The mixture of sources in a training: weights and counts by name, and the resulting shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, inf

from tercet.data.files.sources import Source
from tercet.errors import RecipeError


def weighed(
    sources: Sequence[Source], weights: Mapping[str, float | int], counts: Mapping[str, int]
) -> list[Source]:
    """Return the sources with weights set by name, without those of weight 0.

    A weight is how often each example is used per epoch, a count how many examples of a source
    are. A name is that of a source with all its languages, ``news``, or of one of them,
    ``news/de``, which takes precedence. A count of several languages is shared in proportion to
    their examples.

    Raises:
        RecipeError: for a name that no source has, for a name with a weight and a count, and for
            numbers below zero.
    """
    refuse_unknown([*weights, *counts], sources)
    _check_numbers(weights, counts)
    by_name = dict(weights)
    for name, count in counts.items():
        by_name[name] = count / sum(len(source) for source in sources if name in _names(source))
    found: list[Source] = []
    for source in sources:
        named = [name for name in _names(source) if name in by_name]
        weight = by_name[max(named, key=len)] if named else source.weight
        found.append(replace(source, weight=weight))
    return [source for source in found if source.weight != 0]


def _check_numbers(weights: Mapping[str, float | int], counts: Mapping[str, int]) -> None:
    for name in weights:
        if name in counts:
            raise RecipeError(f"source {name!r} has a weight and a count; give only one of them")
    for name, number in (*weights.items(), *counts.items()):
        if not 0 <= number < inf:
            raise RecipeError(f"the weight or count of {name!r} must be 0 or more, got {number}")


def refuse_unknown(names: Sequence[str], sources: Sequence[Source]) -> None:
    """Raise a RecipeError for a name that no source has."""
    known = sorted({name for source in sources for name in _names(source)})
    for name in names:
        if not names_some(name, sources):
            raise RecipeError(f"there is no source {name!r}; the sources are {', '.join(known)}")


def names_some(name: str, sources: Sequence[Source]) -> bool:
    """Whether one of the sources has this name, alone or with its language."""
    return any(name in _names(source) for source in sources)


def _names(source: Source) -> set[str]:
    return {source.name, source.task or source.name}


@dataclass(frozen=True, slots=True)
class Share:
    """The part of a source in an epoch of training."""

    name: str  # with its language
    source: str
    lang: str
    rows: int
    weight: float | int
    examples: float | int  # rows times weight
    share: float | int  # of the examples of all sources
    batches: int | None  # None if a batch holds every source
    fingerprint: str


def shares_of(sources: Sequence[Source], batch_size: int, *, single: bool = True) -> list[Share]:
    """Return the mixture of an epoch. Batches are counted without regard to length groups."""
    total = sum(len(source) * source.weight for source in sources)
    return [
        Share(
            name=source.name,
            source=source.task or source.name,
            lang=source.lang,
            rows=len(source),
            weight=source.weight,
            examples=len(source) * source.weight,
            share=len(source) * source.weight / total,
            batches=batches_of(len(source), source.weight, batch_size) if single else None,
            fingerprint=source.fingerprint,
        )
        for source in sources
    ]


def batches_of(rows: int, weight: float | int, batch_size: int) -> int:
    """Count the batches of a source in an epoch; each pass over its rows ends with a small one."""
    passes = [rows] * floor(weight) + [round((weight - floor(weight)) * rows)]
    return sum(number // batch_size + (number % batch_size >= 2) for number in passes)


def by_language(shares: Sequence[Share]) -> dict[str, float]:
    """Return the share of each language over all sources, largest first; "" is unknown."""
    found: dict[str, float] = {}
    for each in shares:
        found[each.lang] = found.get(each.lang, 0.0) + each.share
    return dict(sorted(found.items(), key=lambda item: -item[1]))
