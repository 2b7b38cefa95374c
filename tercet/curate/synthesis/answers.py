"""The raw answers of a generator in a file that only grows, so that none is asked for twice."""

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
from tercet.files.atomic import clear_about

_VERSION: Final = 1  # of the file; a reader refuses any other
_KIND: Final = "answers of tercet synthesize"

Key: TypeAlias = tuple[str, int, int, str]


class AnswerLog:
    """Answers by passage: a passage whose document has changed is another one.

    A line is written at once and with one call, so what :meth:`add` has taken outlives a kill. A
    line that a kill or a full disk cut off is dropped when the file is opened again. Failures
    stand there too, and are asked again: only answers count.
    """

    def __init__(self, path: Path, file: BinaryIO, answers: dict[Key, str]) -> None:
        self.path, self._file, self._answers = path, file, answers

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, passage: Passage) -> str | None:
        """The answer for a passage, if there is one."""
        return self._answers.get(_key(passage))

    def add(self, passage: Passage, answer: Answer) -> None:
        """Keep an answer, or why there was none.

        Raises:
            StorageError: when the disk refuses.
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
    """Open the answers in a file, or begin it. ``about`` is all that answers hang on.

    Raises:
        RecipeError: when its answers hang on something else, or another process writes there.
        DataError: when it is another kind of file, or damaged.
        StorageError: when the disk refuses.
    """
    wanted = json.loads(json.dumps({"kind": _KIND, "version": _VERSION, **about}))
    with clear_about(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
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
        answers: dict[Key, str] = {}
        if whole:
            answers = _answers(path, whole, wanted)
        elif not json.dumps(wanted).encode().startswith(content):
            raise _another_kind(path)
        with clear_about(path):
            os.ftruncate(file.fileno(), len(whole))
        if not whole:
            _write(path, file, wanted)
        yield AnswerLog(path, file, answers)


def _answers(path: Path, content: bytes, wanted: Mapping[str, Any]) -> dict[Key, str]:
    lines = content.splitlines()
    _check_head(path, lines[0], wanted)
    found: dict[Key, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            record = json.loads(line)
            key = (record["document"], record["start"], record["end"], record["digest"])
            if "answer" in record:
                found[key] = str(record["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                path, number, "is no answer; delete the line, and its passage is asked again"
            ) from error
    return found


def _check_head(path: Path, line: bytes, wanted: Mapping[str, Any]) -> None:
    try:
        head = json.loads(line)
    except ValueError:
        raise _another_kind(path) from None
    if not isinstance(head, dict) or head.get("kind") != _KIND:
        raise _another_kind(path)
    for name in [*wanted, *head]:
        before, now = head.get(name), wanted.get(name)
        if before != now:
            raise RecipeError(
                f"{path}: its answers were made with another {name.replace('_', ' ')} "
                f"({shown(before)}, now {shown(now)}); give what they were made with, or another "
                "--out, or delete the file to ask anew"
            )


def _another_kind(path: Path) -> DataError:
    return DataError(path, None, "does not hold a generator's answers; give another --out")


def _key(passage: Passage) -> Key:
    return passage.document, passage.start, passage.end, passage.digest


def _write(path: Path, file: BinaryIO, record: Mapping[str, Any]) -> None:
    line = json.dumps(record).encode() + b"\n"
    with clear_about(path):
        written = file.write(line)
        if written != len(line):
            raise OSError(None, "not all of a line could be written; is the disk full?")
