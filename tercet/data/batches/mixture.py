"""How much of each source a training takes: weights and counts by name, and what comes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, inf

from tercet.data.files.sources import Source
from tercet.errors import RecipeError


def weighed(
    sources: Sequence[Source], weights: Mapping[str, float | int], counts: Mapping[str, int]
) -> list[Source]:
    """The sources with weights set by name; those of weight 0 are left out.

    A weight says how often each example is used an epoch, a count how many examples of a source
    are. A name is that of a source with all its languages, ``news``, or of one of them,
    ``news/de``, which goes before. A count of several languages is shared in proportion to their
    examples.

    Raises:
        RecipeError: for a name that no source has, with those that there are; for a name with a
            weight and a count; and for numbers below zero.
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
            raise RecipeError(f"source {name!r} is given a weight and a count; give one of them")
    for name, number in (*weights.items(), *counts.items()):
        if not 0 <= number < inf:
            raise RecipeError(f"source {name!r} is given {number}; give 0 or a number above it")


def refuse_unknown(names: Sequence[str], sources: Sequence[Source]) -> None:
    """Stop where a name is that of no source.

    Raises:
        RecipeError: with the names that there are.
    """
    known = sorted({name for source in sources for name in _names(source)})
    for name in names:
        if not names_some(name, sources):
            raise RecipeError(f"there is no source {name!r}; those given are {', '.join(known)}")


def names_some(name: str, sources: Sequence[Source]) -> bool:
    """Whether one of the sources has this name, alone or with its language."""
    return any(name in _names(source) for source in sources)


def _names(source: Source) -> set[str]:
    return {source.name, source.task or source.name}


@dataclass(frozen=True, slots=True)
class Share:
    """What a training takes of a source in an epoch."""

    name: str  # with its language
    source: str
    lang: str
    rows: int
    weight: float | int
    examples: float | int  # rows times weight
    share: float | int  # of the examples of all sources
    batches: int | None  # None where a batch holds every source
    fingerprint: str


def shares_of(sources: Sequence[Source], batch_size: int, *, single: bool = True) -> list[Share]:
    """The mixture of an epoch. Batches are counted without regard to length groups."""
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
    """Batches of one source in an epoch: each pass over its rows ends with a smaller one."""
    passes = [rows] * floor(weight) + [round((weight - floor(weight)) * rows)]
    return sum(number // batch_size + (number % batch_size >= 2) for number in passes)


def by_language(shares: Sequence[Share]) -> dict[str, float]:
    """The share of each language over all sources, the largest first; "" is: not told."""
    found: dict[str, float] = {}
    for each in shares:
        found[each.lang] = found.get(each.lang, 0.0) + each.share
    return dict(sorted(found.items(), key=lambda item: -item[1]))
