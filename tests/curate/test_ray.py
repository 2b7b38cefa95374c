"""Work on a real Ray cluster: two nodes on this machine, with one CPU each."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tercet.curate.jobs import runners
from tercet.curate.jobs.job import run_units
from tests.curate.driving import ended, start, wait_for, wait_until_quiet
from tests.curate.squares import Squares, files, log_of, units
from tests.processes import ROOT

pytest.importorskip("daft")
pytest.importorskip("ray")
pytestmark = pytest.mark.ray

COUNT = 12
SQUARES = [number**2 for number in range(COUNT)]


@pytest.fixture(scope="module")
def runner() -> Iterator[dict[str, Any]]:
    """A cluster for this module, as the runner that works there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        cluster = two_nodes()
        try:
            # A driver would look for this machine under the address that others see.
            patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
            yield {"engine": "ray", "address": cluster.address}
        finally:
            cluster.shutdown()


def two_nodes() -> Any:
    """Ray gives a node 30 seconds to come up, which a busy machine may take."""
    from ray.cluster_utils import Cluster

    node = {
        "num_cpus": 1,
        "object_store_memory": 80_000_000,
        "node_ip_address": "127.0.0.1",
        "include_dashboard": False,
    }
    for attempt in range(3):
        cluster = Cluster()
        try:
            cluster.add_node(**node)
            cluster.add_node(**node)
            return cluster
        except Exception:  # what Ray raises for a node that starts too slowly; the last is shown
            cluster.shutdown()
            if attempt == 2:
                raise
    raise AssertionError


def results(out: Path, runner: dict[str, Any], **job: Any) -> list[int]:
    status, said, complaint = ended(start(out, runner, COUNT, **job))
    assert status == 0, complaint
    return json.loads(said)


def test_two_nodes_write_what_a_loop_writes(tmp_path: Path, runner: dict[str, Any]):
    plain = Squares(tmp_path / "plain")
    plain.out.mkdir()
    list(run_units(plain, units(COUNT), plain.out / "manifest", runner=runners.LOOP))
    out = tmp_path / "spread"
    assert results(out, runner, pause=0.2) == SQUARES
    assert files(out) == files(plain.out)
    done = log_of(out, "done")
    assert sorted(int(number) for number, *_ in done) == list(range(COUNT))
    assert len({node for _, _, node, _ in done}) == 2
    assert len(log_of(out, "opened")) == 2  # one worker a node, each opened once


def test_a_killed_worker_loses_and_repeats_nothing(tmp_path: Path, runner: dict[str, Any]):
    out = tmp_path / "job"
    assert results(out, runner, pause=0.2, dies_at=5) == SQUARES
    assert len(log_of(out, "killed")) == 1
    done = [int(number) for number, *_ in log_of(out, "done")]
    assert sorted(done) == list(range(COUNT))


def test_after_a_kill_of_the_driver_only_missing_units_are_done(
    tmp_path: Path, runner: dict[str, Any]
):
    out = tmp_path / "job"
    first = start(out, runner, COUNT, pause=0.5)
    try:
        wait_for(out / "manifest/numbers/2.json", seconds=300)
    finally:
        first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_until_quiet(out)
    kept = {int(path.stem) for path in (out / "manifest/numbers").glob("*.json")}
    assert 3 <= len(kept) < COUNT
    (out / "log").unlink()
    assert results(out, runner) == SQUARES
    done = [int(number) for number, *_ in log_of(out, "done")]
    assert sorted(done) == sorted(set(range(COUNT)) - kept)


def test_a_mistake_of_the_user_is_told_in_one_line(tmp_path: Path, runner: dict[str, Any]):
    out = tmp_path / "job"
    status, _, complaint = ended(start(out, runner, COUNT, breaks_at=5))
    assert status == 1
    said = complaint.strip().splitlines()[-1]
    assert said == f"tercet.errors.DataError: {out}/numbers.jsonl:5: is odd; make it even"
    assert results(out, runner) == SQUARES
