"""The versions that pyproject.toml allows are those on which ``make bounds`` passed."""

import json
from pathlib import Path
from typing import Any

from tests import bounds

RECORD: dict[str, Any] = json.loads(bounds.RESULT.read_text())
PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"


def numbers(version: str) -> tuple[int, ...]:
    """The version without the zeros at its end: 2.11 is 2.11.0."""
    found = [int(part) for part in version.partition("+")[0].split(".")]
    while found and found[-1] == 0:
        found.pop()
    return tuple(found)


def test_the_lowest_versions_allowed_are_those_that_were_run():
    allowed = bounds.lowest()
    assert RECORD["lowest"] == allowed
    for row in RECORD["rows"]:
        run = row["versions"]
        assert {name: numbers(run[name]) for name in allowed} == {
            name: numbers(version) for name, version in allowed.items()
        }
        assert row["failed"] == 0 and row["passed"] > 0


def test_each_python_allowed_was_run():
    run = {row["versions"]["python"].rpartition(".")[0] for row in RECORD["rows"]}
    assert run == set(bounds.pythons())


def test_the_page_says_when_and_on_what_it_passed():
    page = PAGE.read_text()
    assert f"last passed on {RECORD['day']}" in page
    for row in RECORD["rows"]:
        assert f"| {row['versions']['python']} | {row['passed']} | {row['skipped']} |" in page
    for name in ("torch", "transformers", "peft"):
        assert f"{name} {RECORD['lowest'][name]}" in page
