import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tercet.curate.jobs.job import DoUnit, UnitReport, WorkUnit, run_units

UNITS = [WorkUnit(f"numbers/{n}", {"number": n}) for n in range(4)]


@dataclass
class Squares:
    """Writes the square of a number into a file; stops at one of them."""

    out: Path
    power: int = 2
    breaks_at: int | None = None
    opened: int = 0
    done: list[int] = field(default_factory=list)
    name: str = "squares"

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"power": self.power}

    def files(self, unit: WorkUnit) -> list[Path]:
        return [self.out / str(unit.reads["number"])]

    def open(self) -> DoUnit:
        self.opened += 1
        return self._do

    def _do(self, unit: WorkUnit) -> UnitReport:
        number = unit.reads["number"]
        if number == self.breaks_at:
            raise KeyboardInterrupt
        self.done.append(number)
        (self.out / str(number)).write_text(str(number**self.power))
        return {"result": number**self.power}


def results(job: Squares) -> list[int]:
    return [report["result"] for _, report in run_units(job, UNITS, job.out / "manifest")]


def test_all_units_are_done_in_order_and_the_model_is_loaded_once(tmp_path: Path):
    job = Squares(tmp_path)
    assert results(job) == [0, 1, 4, 9]
    assert job.opened == 1


def test_a_stopped_job_goes_on_with_what_is_missing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        results(Squares(tmp_path, breaks_at=2))
    again = Squares(tmp_path)
    assert results(again) == [0, 1, 4, 9]
    assert again.done == [2, 3]


def test_a_finished_job_loads_nothing(tmp_path: Path):
    results(Squares(tmp_path))
    again = Squares(tmp_path)
    assert results(again) == [0, 1, 4, 9]
    assert again.opened == 0


def test_other_settings_and_other_input_are_done_again(tmp_path: Path):
    results(Squares(tmp_path))
    assert results(Squares(tmp_path, power=3)) == [0, 1, 8, 27]
    changed = Squares(tmp_path, power=3)
    units = [*UNITS[:3], WorkUnit("numbers/3", {"number": 5})]
    assert [r["result"] for _, r in run_units(changed, units, tmp_path / "manifest")][3] == 125
    assert changed.done == [5]


def test_a_damaged_record_counts_as_none(tmp_path: Path):
    results(Squares(tmp_path))
    (tmp_path / "manifest/numbers/1.json").write_text("{")
    again = Squares(tmp_path)
    assert results(again) == [0, 1, 4, 9]
    assert again.done == [1]


def test_a_unit_whose_file_was_altered_is_done_again_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    assert results(Squares(tmp_path)) == [0, 1, 4, 9]
    (tmp_path / "2").write_text("5")
    (tmp_path / "3").unlink()
    again = Squares(tmp_path)
    assert results(again) == [0, 1, 4, 9]
    assert again.done == [2, 3]
    assert (tmp_path / "2").read_text() == "4"
    assert f"{tmp_path / '2'}: is damaged, and is made again" in caplog.text


def test_files_of_two_units_that_were_swapped_are_made_again(tmp_path: Path):
    results(Squares(tmp_path))
    (tmp_path / "2").rename(tmp_path / "x")
    (tmp_path / "3").rename(tmp_path / "2")
    (tmp_path / "x").rename(tmp_path / "3")
    again = Squares(tmp_path)
    assert results(again) == [0, 1, 4, 9]
    assert again.done == [2, 3]


def test_a_record_of_an_earlier_version_is_used_with_one_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    results(Squares(tmp_path))
    for path in (tmp_path / "manifest" / "numbers").glob("*.json"):
        old = json.loads(path.read_text())
        path.write_text(json.dumps({"of": old["of"], "report": old["report"]}))
    again = Squares(tmp_path)
    assert results(again) == [0, 1, 4, 9]
    assert again.done == []
    assert caplog.text.count("have no checksums") == 1
