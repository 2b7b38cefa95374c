"""A log of a generator's raw answers, so that none is requested twice."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from tercet.curate.synthesis.generators import Answer
from tercet.curate.synthesis.passages import Passage
from tercet.data.files.examples import shown
from tercet.errors import DataError, RecipeError
from tercet.files.artifacts import parse_json
from tercet.files.atomic import clear_about
from tercet.files.checksums import sealed, unsealed
from tercet.files.limits import unreadable

_VERSION: Final = 1  # of the file; others are refused
_KIND: Final = "answers of tercet synthesize"

AnswerKey: TypeAlias = tuple[str, int, int, str]


class AnswerLog:
    """Answers by passage; a changed passage has another key.

    Each line is written in one call, so that it survives a kill; a line that was cut off is dropped
    when the file is opened again. Failures are logged too, and requested again.
    """

    def __init__(self, path: Path, file: BinaryIO, answers: dict[AnswerKey, str]) -> None:
        self.path, self._file, self._answers = path, file, answers

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, passage: Passage) -> str | None:
        """Return the answer for a passage, if there is one."""
        return self._answers.get(_key(passage))

    def add(self, passage: Passage, answer: Answer) -> None:
        """Log an answer or a failure.

        Raises:
            StorageError: if the disk refuses.
        """
        document, start, end, digest = _key(passage)
        record: dict[str, Any] = {"document": document, "start": start, "end": end}
        record |= {"digest": digest, "position": round(passage.position, 4)}
        record |= {"answer": answer.text} if answer.failure is None else {"failure": answer.failure}
        _write(self.path, self._file, record)
        if answer.failure is None:
            self._answers[document, start, end, digest] = answer.text


@contextmanager
def answer_log(path: Path, about: Mapping[str, Any]) -> Iterator[AnswerLog]:
    """Open a file of answers, or create it. ``about`` is all that the answers depend on.

    Raises:
        RecipeError: if its answers depend on other settings, or another process writes there.
        DataError: if it is another kind of file, or damaged.
        StorageError: if the disk refuses.
    """
    wanted = json.loads(json.dumps({"kind": _KIND, "version": _VERSION, **about}))
    if problem := unreadable(path):
        raise DataError(path, None, problem)
    with clear_about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0, opener=_private)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"{path}: another process is writing there; wait until it is done, stop it, or "
                "give another --out"
            ) from None
        with clear_about(path):
            file.seek(0)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        answers = _answers(path, whole, wanted) if whole else dict[AnswerKey, str]()
        if not whole and not json.dumps(wanted).encode().startswith(content):
            raise _another_kind(path)
        with clear_about(path):
            os.ftruncate(file.fileno(), len(whole))
        if not whole:
            _write(path, file, wanted)
        yield AnswerLog(path, file, answers)


def _private(path: str, flags: int) -> int:
    """Open a file that only its owner may read, whoever could before."""
    handle = os.open(path, flags, 0o600)
    os.fchmod(handle, 0o600)
    return handle


def _answers(path: Path, content: bytes, wanted: Mapping[str, Any]) -> dict[AnswerKey, str]:
    lines = content.splitlines()
    _check_head(path, lines[0], wanted)
    found: dict[AnswerKey, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            record = unsealed(parse_json(line))
            key = (record["document"], record["start"], record["end"], record["digest"])
            if "answer" in record:
                found[key] = str(record["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                path, number, "is not an answer; delete the line, and it is requested again"
            ) from error
    return found


def _check_head(path: Path, line: bytes, wanted: Mapping[str, Any]) -> None:
    try:
        head = unsealed(parse_json(line))
    except ValueError:
        raise _another_kind(path) from None
    if not isinstance(head, dict) or head.get("kind") != _KIND:
        raise _another_kind(path)
    for name in [*wanted, *head]:
        before, now = head.get(name), wanted.get(name)
        if before != now:
            raise RecipeError(
                f"{path}: its answers were made with another {name.replace('_', ' ')} "
                f"({shown(before)}, now {shown(now)}); use the same settings, or another --out, or "
                "delete the file to start over"
            )


def _another_kind(path: Path) -> DataError:
    return DataError(path, None, "is not a file of a generator's answers; give another --out")


def _key(passage: Passage) -> AnswerKey:
    return passage.document, passage.start, passage.end, passage.digest


def _write(path: Path, file: BinaryIO, record: Mapping[str, Any]) -> None:
    line = json.dumps(sealed(record)).encode() + b"\n"
    with clear_about(path):
        written = file.write(line)
        if written != len(line):
            raise OSError(None, "a line could not be written in full; is the disk full?")
