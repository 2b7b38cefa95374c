"""Training that mines its own negatives, whole and killed. As a script: a run to be killed."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet.curate.mining import document_pools as mining_documents
from tercet.curate.mining.miner import Miner
from tercet.data.files.sources import open_source
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.objectives import contrastive
from tercet.objectives.contrastive import PairWork
from tercet.training import refresh as refreshing
from tercet.training import trainer
from tercet.training.log import read
from tercet.training.loop import train
from tercet.training.recipe import Recipe
from tercet.training.refresh import Refresher
from tercet.types import Example
from tests import toy
from tests.training.refreshes import QUIET, prepare, recipe_for, rows, small_parts


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    small_parts(monkeypatch)


@pytest.fixture
def source(tmp_path):
    return prepare(tmp_path)


@pytest.fixture
def recipe(encoder_folder) -> Recipe:
    return recipe_for(encoder_folder)


def weights(embedder: Embedder) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in embedder.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_reads_new_negatives_after_every_refresh_and_says_so(
    source, recipe, tmp_path, monkeypatch
):
    batches: list[list[Example]] = []
    batch = PairWork.batch

    def recorded(self: PairWork, rows: Any, seed: Any) -> Any:
        batches.append(rows.examples(self.drawn))
        return batch(self, rows, seed)

    monkeypatch.setattr(PairWork, "batch", recorded)
    monkeypatch.setattr("tercet.training.loop.forecast_stages", lambda *_: [])  # looks at a batch
    monkeypatch.setattr("tercet.training.loop.lines_of", lambda _: [])
    said: list[str] = []
    train(recipe, [source], tmp_path / "run", run=QUIET, say=said.append)
    plain = replace(recipe, stages=(replace(recipe.stages[0], refresh=None),))
    train(plain, [source], tmp_path / "plain", run=QUIET)
    queries = [[example.query for example in some] for some in batches]
    assert queries[:6] == queries[6:]  # the order of batches is that of a run without
    given = {e.query: e.negatives for e in rows()}
    own = [all(e.negatives == given[e.query] for e in some) for some in batches]
    assert own == [True] * 2 + [False] * 4 + [True] * 6
    assert all(len(e.negatives) == 3 for some in batches[2:6] for e in some)
    assert any(
        dict(zip(queries[2] + queries[3], batches[2] + batches[3], strict=True))[e.query] != e
        for e in batches[4]
    )
    assert [line.split(":")[0] for line in said if "negatives for" in line] == [
        "after step 2",
        "after step 4",
    ]
    told = [record for record in read(tmp_path / "run/log.jsonl") if "negatives" in record]
    assert [record["step"] for record in told] == [3, 5]
    assert told[0]["negatives"] == 72 and told[0]["without_negatives"] == 0
    assert 0 < told[1]["new_negatives"] < told[0]["new_negatives"] <= 1


class Killed(BaseException):
    """What a kill looks like from inside."""


def dying(monkeypatch, where: Any, name: str, after: int) -> None:
    """The call after so many dies before it does anything."""
    real, calls = getattr(where, name), []

    def call(*args: Any, **options: Any) -> Any:
        if len(calls) == after:
            raise Killed
        calls.append(1)
        return real(*args, **options)

    monkeypatch.setattr(where, name, call)


# Mining writes three parts, each with a file of counts, about.json before and refresh.json after.
KILLS = {
    "while documents are encoded": (mining_documents, "replacing_file", 2),
    "between two parts": (refreshing, "write_examples", 1),
    "before it is done": (refreshing, "write_json", 4),
    "before the one before is deleted": (Refresher, "_sweep", 1),
    "in the step after": (contrastive, "backward_in_chunks", 2),
    "in the last step": (contrastive, "backward_in_chunks", 5),
}


@pytest.fixture(scope="module")
def whole(encoder_folder, tmp_path_factory) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights and log of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch)
        ended = train(recipe_for(encoder_folder), [prepare(folder)], folder / "run", run=QUIET)
    return weights(ended), facts(folder / "run")


def facts(run: Path) -> list[dict[str, Any]]:
    timed = ("tokens_per_second", "learning_rate")
    return [
        {k: v for k, v in record.items() if k not in timed} for record in read(run / "log.jsonl")
    ]


@pytest.mark.parametrize("moment", KILLS)
def test_a_run_killed_while_mining_ends_with_the_bits_of_one_that_was_not(
    source, recipe, tmp_path, monkeypatch, whole, moment
):
    with monkeypatch.context() as patch:
        dying(patch, *KILLS[moment])
        with pytest.raises(Killed):
            train(recipe, [source], tmp_path / "run", run=QUIET)
    ended = train(recipe, [source], tmp_path / "run", run=QUIET)
    assert same_bits(whole[0], weights(ended))
    assert facts(tmp_path / "run") == whole[1]


def test_parts_that_a_killed_run_has_mined_are_not_mined_again(
    source, recipe, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        dying(patch, refreshing, "write_examples", 2)
        with pytest.raises(Killed):
            train(recipe, [source], tmp_path / "run", run=QUIET)
    parts = tmp_path / "run/refresh-2"
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("0-*.jsonl")}
    assert len(kept) == 2
    with monkeypatch.context() as patch:
        dying(patch, contrastive, "backward_in_chunks", 0)  # step 3, the first one again
        with pytest.raises(Killed):
            train(recipe, [source], tmp_path / "run", run=QUIET)
    assert (parts / "refresh.json").exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_run_whose_negatives_are_gone_is_not_gone_on_with(source, recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        dying(patch, contrastive, "backward_in_chunks", 5)
        with pytest.raises(Killed):
            train(recipe, [source], tmp_path / "run", run=replace(QUIET, save_steps=5))
    (tmp_path / "run/refresh-4/refresh.json").unlink()
    with pytest.raises(
        RecipeError, match="refresh-4: the negatives that this run was trained with"
    ):
        train(recipe, [source], tmp_path / "run", run=replace(QUIET, save_steps=5))


def test_a_run_is_not_gone_on_with_when_its_further_documents_are_other_ones(
    source, recipe, tmp_path, monkeypatch
):
    more = tmp_path / "more.txt"
    more.write_text("a text to be mined\n")
    stage = recipe.stages[0]
    assert stage.refresh is not None
    refresh = replace(stage.refresh, corpus=(str(more),))
    mining = replace(recipe, stages=(replace(stage, refresh=refresh),))
    with monkeypatch.context() as patch:
        dying(patch, contrastive, "backward_in_chunks", 5)
        with pytest.raises(Killed):
            train(mining, [source], tmp_path / "run", run=QUIET)
    more.write_text("another text to be mined\n")
    with pytest.raises(RecipeError, match=r"other settings \(corpus .*more\.txt was '.*', now '"):
        train(mining, [source], tmp_path / "run", run=QUIET)
    more.write_text("a text to be mined\n")
    train(mining, [source], tmp_path / "run", run=QUIET)


@pytest.mark.parametrize("in_batch", ["all", "none"])
def test_rows_may_have_fewer_negatives_after_a_refresh_or_longer_ones_or_none(
    source, recipe, tmp_path, monkeypatch, in_batch
):
    """Trap B17 of BGE-M3.

    Length groups, and so the batches, stay those of the texts that the rows came with.
    """
    found: list[Example] = []
    real = Miner.mined

    def uneven(self: Miner, *given: Any) -> list[Example]:
        """The first row loses all, the second all but one, and the third gets a long one."""
        rows = real(self, *given)
        first, second, third, *others = rows
        rows = [
            replace(first, negatives=(), negative_scores=None),
            replace(second, negatives=second.negatives[:1], negative_scores=None),
            replace(third, negatives=(" ".join(["music"] * 60),) * 5, negative_scores=None),
            *others,
        ]
        found.extend(rows)
        return rows

    monkeypatch.setattr(Miner, "mined", uneven)
    stage = replace(recipe.stages[0], length_edges=(9,), token_budget=100, in_batch=in_batch)
    uneven_run = replace(recipe, stages=(stage,))
    train(uneven_run, [source], tmp_path / "run", run=QUIET)
    counts = {len(example.negatives) for example in found}
    assert {0, 1, 5} < counts
    log = [record for record in read(tmp_path / "run/log.jsonl") if "loss" in record]
    assert len(log) == 6 and all(math.isfinite(record["loss"]) for record in log)
    monkeypatch.undo()
    small_parts(monkeypatch)
    plain = replace(recipe, stages=(replace(stage, refresh=None),))
    train(plain, [source], tmp_path / "plain", run=QUIET)
    assert [r["examples"] for r in log] == [
        r["examples"] for r in read(tmp_path / "plain/log.jsonl")
    ]


def test_batch_sizes_by_length_survive_a_kill_and_other_memory(
    source, recipe, tmp_path, monkeypatch
):
    """A run that goes on keeps the sizes that fitted when it began."""
    stage = replace(recipe.stages[0], refresh=None, batching="fit", length_edges=(9,), steps=6)
    fitted = replace(recipe, stages=(stage,))
    run = replace(QUIET, memory_gb=0.1, chunk_tokens=100, save_steps=2)
    end = weights(train(fitted, [source], tmp_path / "whole", run=run))
    with monkeypatch.context() as patch:
        dying(patch, contrastive, "backward_in_chunks", 3)
        with pytest.raises(Killed):
            train(fitted, [source], tmp_path / "run", run=run)
    monkeypatch.setattr(trainer, "groups_of", None)  # is not asked again
    less = replace(run, memory_gb=0.05)
    assert same_bits(end, weights(train(fitted, [source], tmp_path / "run", run=less)))


def test_a_signal_while_mining_ends_at_once_and_changes_nothing(
    source, recipe, tmp_path, monkeypatch, capfd
):
    whole = weights(train(recipe, [source], tmp_path / "whole", run=QUIET))
    real, run = refreshing.write_examples, tmp_path / "run"

    def sending(*arguments: Any) -> None:
        real(*arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(refreshing, "write_examples", sending)
        train(recipe, [source], run, run=QUIET)
    assert end.value.code == 143
    assert "stopped after step 2 of 6 (contrastive)" in capfd.readouterr().err
    assert not (run / "refresh-2/refresh.json").exists()
    assert same_bits(weights(train(recipe, [source], run, run=QUIET)), whole)


# ---- kill -9 ---------------------------------------------------------------------------------


def alone(folder: Path, out: str) -> None:
    """Train in a process of its own."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch)
        train(
            recipe_for(folder / "base"),
            [open_source(folder / "pairs.jsonl")],
            folder / out,
            run=QUIET,
        )


@pytest.mark.slow
def test_kill_9_while_mining_changes_nothing(tmp_path):
    prepare(tmp_path)
    toy.save_model(tmp_path / "base", "bert")
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }

    def command(out: str) -> list[str]:
        return [sys.executable, __file__, str(tmp_path), out]

    subprocess.run(command("whole"), check=True, env=environment, **quiet)
    process = subprocess.Popen(command("killed"), env=environment, **quiet)
    while not (tmp_path / "killed/refresh-2/0-0.jsonl").exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed/model").exists()
    subprocess.run(command("killed"), check=True, env=environment, **quiet)
    ends = [Embedder.load(tmp_path / name / "model") for name in ("whole", "killed")]
    assert same_bits(weights(ends[0]), weights(ends[1]))


if __name__ == "__main__":
    alone(Path(sys.argv[1]), sys.argv[2])
