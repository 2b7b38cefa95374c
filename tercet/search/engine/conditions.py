"""Conditions of a search that no document fulfils, with the fields and values that there are."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any, Final, TypeAlias

from tercet.files.console import one_line, shortened
from tercet.search.engine.engine import Engine

_FIELDS_NAMED: Final = 10  # in a message
_VALUES_REMEMBERED: Final = 1_000  # of each field, to name those that are like a wrong one

Condition: TypeAlias = tuple[str, str, list[Any]]
"""A field, what it should be, and the values that this may stand for."""


def unfulfilled(engine: Engine, conditions: Sequence[Condition]) -> Iterator[str]:
    """Yield a sentence about each condition that no document fulfils; reads all documents."""
    waiting, known = list(conditions), dict[str, set[str]]()
    for record in engine.scan() if waiting else ():
        for name, value in record.fields.items():
            values = value if isinstance(value, list | tuple) else [value]
            waiting = [c for c in waiting if c[0] != name or not _any_equal(values, c[2])]
            seen = known.setdefault(name, set())
            if len(seen) < _VALUES_REMEMBERED:
                seen |= {str(each) for each in values}
        if not waiting:
            return
    for name, text, _ in waiting:
        values = known.get(name)
        if values is None:
            what, lacks = one_line(name), "this field"
            there = one_line(", ".join(islice(sorted(known), _FIELDS_NAMED))) or "none"
        else:
            what, lacks = one_line(f"{name}={text}"), "this value"
            near = get_close_matches(text, values, _FIELDS_NAMED, cutoff=0.5) or sorted(values)
            there = one_line(", ".join(shortened(each, 40) for each in near[:_FIELDS_NAMED]))
        what = what.encode("utf-8", "backslashreplace").decode()  # of bytes that are no Unicode
        yield f"{what}: no document has {lacks}; there are: {there}"


def _any_equal(values: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether two lists share a value; true is not 1."""
    return any(
        a == b and isinstance(a, bool) == isinstance(b, bool) for a in values for b in wanted
    )
