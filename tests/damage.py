"""Damage to files, one at a time: other bits, cuts, deletion, and files in each other's place."""

import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

Answer = TypeVar("Answer")


def altered_copies(content: bytes, count: int = 60, ends: int = 24) -> Iterator[bytes]:
    """Copies with one other bit: in each of the first and last bytes, and in some in between."""
    drawn, size = random.Random(0), len(content)
    places = {*range(min(ends, size)), *range(max(0, size - ends), size)}
    places |= {drawn.randrange(size) for _ in range(count if size else 0)}
    for place in sorted(places):
        other = bytes([content[place] ^ 1 << drawn.randrange(8)])
        yield content[:place] + other + content[place + 1 :]


def damages(folder: Path, *patterns: str, count: int = 5) -> Iterator[str]:
    """Damage the files of a folder in one way after the other, and name each; all is put back."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files = sorted(path for path in before for each in patterns or ("*",) if path.match(each))
    files = [path for path in files if path.name != ".lock"]

    def put_back() -> None:
        for path, content in before.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
        for path in folder.rglob("*"):
            if path.is_file() and path not in before:
                path.unlink()

    for path in files:
        content, name = before[path], str(path.relative_to(folder))
        for number, other in enumerate(altered_copies(content, count, ends=2)):
            path.write_bytes(other)
            yield f"{name} with another bit, {number}"
            put_back()
        for size in {0, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:size])
            yield f"{name} cut to {size}"
            put_back()
        path.unlink()
        yield f"{name} deleted"
        put_back()
    for one, other in pairwise(files):
        one.write_bytes(before[other])
        other.write_bytes(before[one])
        yield f"{one.relative_to(folder)} and {other.relative_to(folder)} swapped"
        put_back()


def unnoticed(
    folder: Path,
    *patterns: str,
    ask: Callable[[], Answer],
    same: Callable[[Answer], bool],
    refusals: type[Exception] | tuple[type[Exception], ...] = (),
    count: int = 5,
) -> list[str]:
    """Return the damages after which there is neither an error of ours nor the same answer."""
    wrong = []
    for name in damages(folder, *patterns, count=count):
        try:
            if not same(ask()):
                wrong.append(name)
        except refusals:
            pass
    return wrong
