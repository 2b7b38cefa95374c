"""Negatives that are mined by the model in training. As a script: one of two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tercet import distributed
from tercet.curate import catalog, corpus
from tercet.curate.mine import Mining
from tercet.curate.rules import MiningRule
from tercet.data.sources import Source, iter_examples, open_source, write_examples
from tercet.data.texts import normal_form, open_texts
from tercet.errors import RecipeError
from tercet.nn.embedder import Embedder
from tercet.objectives import contrastive
from tercet.objectives.contrastive import PairsAtWork
from tercet.recipes.finetune import finetune
from tercet.train import loop
from tercet.train import refresh as refreshing
from tercet.train.log import read
from tercet.train.loop import train
from tercet.train.recipe import Recipe, Refresh
from tercet.train.refresh import Refresher
from tercet.train.run import Run
from tercet.types import Example
from tests import toy
from tests.processes import run_together
from tests.toy import SENTENCES

QUIET = Run(device="cpu", show_progress=False, save_steps=4)
NEAREST = Mining(rule=MiningRule(kind="naive"), negatives=3, depth=12)
PART = 10  # rows that are mined together


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    small_parts(monkeypatch)


def small_parts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(corpus, "SHARD", PART)
    patch.setattr(catalog, "SHARD", PART)


def rows() -> list[Example]:
    """Two rows ask the same, so that the answer of one is never a negative of the other."""
    found = [
        Example(" ".join(text.split()[-2:]) + f" {word}", (f"{text} {word}",), (f"a {word}",))
        for word in ("mail", "music")  # which the tokenizer knows: no two texts score the same
        for text in SENTENCES
    ]
    found[5] = replace(found[5], query=found[0].query.upper())
    found[7] = replace(found[7], positives=(found[7].positives[0], SENTENCES[3]))
    found[8] = replace(found[8], negatives=(SENTENCES[7].upper() + "  mail",))
    return found


def prepare(folder: Path) -> Source:
    write_examples(folder / "pairs.jsonl", rows())
    return open_source(folder / "pairs.jsonl")


@pytest.fixture
def source(tmp_path):
    return prepare(tmp_path)


@pytest.fixture(scope="module")
def embedder(encoder_folder):
    return Embedder.load(encoder_folder)


@pytest.fixture
def recipe(encoder_folder) -> Recipe:
    return recipe_for(encoder_folder)


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    """Six steps of 12 examples in three epochs; mined after two and four."""
    plain = finetune(base=str(folder), batch_size=12, learning_rate=1e-3, steps=6, negatives=2)
    refresh = Refresh(every=2, mining=replace(NEAREST, depth=16, rule=DRAWN))
    return replace(plain, stages=(replace(plain.stages[0], refresh=refresh, **changes),))


DRAWN = MiningRule(kind="naive", shift=1, sample_from=8)


def all_of(source: Source) -> list[Example]:
    return source.examples(range(len(source)))


def mined(
    embedder: Embedder, sources: Sequence[Source], folder: Path, step: int = 2, **changes: Any
) -> list[list[Example]]:
    """The examples of each source after a refresh."""
    refresher = Refresher(Refresh(every=2, **{"mining": NEAREST, **changes}), sources, folder, 0)
    refresher.mine(embedder, step)
    return [all_of(source) for source in refresher.sources]


def test_the_negatives_are_the_nearest_documents_that_answer_nothing(source, embedder, tmp_path):
    (found,) = mined(embedder, [source], tmp_path / "run")
    given = rows()
    documents = {normal_form(t): t for e in given for t in (*e.positives, *e.negatives)}
    vectors = embedder.encode(list(documents.values())).astype(np.float64)
    for old, new in zip(given, found, strict=True):
        assert replace(new, negatives=()) == replace(old, negatives=(), task="pairs")
        known = {normal_form(old.query)}
        for other in given:
            if normal_form(other.query) == normal_form(old.query):
                known |= set(map(normal_form, other.positives))
        scores = vectors @ embedder.encode([old.query], "query")[0].astype(np.float64)
        order = [list(documents)[i] for i in np.argsort(-scores)]
        expected = [key for key in order if key not in known][:3]
        assert list(map(normal_form, new.negatives)) == expected


def test_a_positive_of_the_same_query_in_another_row_or_case_is_no_negative(
    source, embedder, tmp_path
):
    everything = replace(NEAREST, negatives=40, depth=80)
    (found,) = mined(embedder, [source], tmp_path / "run", mining=everything)
    given = rows()
    for row in (0, 5):
        answers = {normal_form(text) for r in (0, 5) for text in given[r].positives}
        assert not answers & set(map(normal_form, found[row].negatives))
        assert len(found[row].negatives) > 20
    assert normal_form(SENTENCES[3]) not in map(normal_form, found[7].negatives)


def test_rows_and_all_that_batches_hang_on_stay(source, embedder, tmp_path):
    refresher = Refresher(Refresh(every=2, mining=NEAREST), [source], tmp_path / "run", 0)
    (view,) = refresher.sources
    before = view.examples([20, 3, 3, 11])
    assert before == source.examples([20, 3, 3, 11])
    refresher.mine(embedder, 2)
    after = view.examples([20, 3, 3, 11])
    assert [e.query for e in after] == [e.query for e in before]
    assert all(a.negatives != b.negatives for a, b in zip(after, before, strict=True))
    assert view.fingerprint == source.fingerprint and view.sizes is source.sizes


def test_own_negatives_stay_beside_mined_ones_on_request(source, embedder, tmp_path):
    (found,) = mined(embedder, [source], tmp_path / "run", mining=replace(NEAREST, keep=True))
    for old, new in zip(rows(), found, strict=True):
        assert len(new.negatives) == 3
        assert new.negatives[0] == old.negatives[0]


def test_documents_of_further_files_are_mined_too(source, embedder, tmp_path):
    text = rows()[2].query + " again"
    (tmp_path / "more.txt").write_text(text + "\n")
    more = (str(tmp_path / "more.txt"),)
    (found,) = mined(embedder, [source], tmp_path / "run", corpus=more)
    assert any(text in example.negatives for example in found)


def test_sources_of_the_same_name_and_of_many_parts_are_told_apart(embedder, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    write_examples(tmp_path / "a/pairs.jsonl", rows())
    write_examples(tmp_path / "b/pairs.jsonl", rows()[::-1])
    sources = [open_source(tmp_path / name / "pairs.jsonl") for name in ("a", "b")]
    first, second = mined(embedder, sources, tmp_path / "run")
    assert first == second[::-1]
    assert [e.query for e in first] == [e.query for e in rows()]


def test_what_is_drawn_differs_by_refresh_and_by_seed_and_repeats_otherwise(
    source, embedder, tmp_path
):
    drawn = replace(NEAREST, rule=DRAWN, depth=20)

    def found(folder: str, step: int, seed: int) -> list[Example]:
        refresher = Refresher(Refresh(every=2, mining=drawn), [source], tmp_path / folder, seed)
        refresher.mine(embedder, step)
        return all_of(refresher.sources[0])

    one = found("one", 2, 0)
    assert one == found("two", 2, 0)
    assert one != found("three", 4, 0)
    assert one != found("four", 2, 1)


def test_what_changed_is_counted(source, embedder, tmp_path):
    refresher = Refresher(Refresh(every=2, mining=NEAREST), [source], tmp_path / "run", 0)
    first = refresher.mine(embedder, 2)
    given = [set(map(normal_form, e.negatives)) for e in rows()]
    now = [set(map(normal_form, e.negatives)) for e in all_of(refresher.sources[0])]
    new = sum(len(after - before) for before, after in zip(given, now, strict=True))
    assert (first.rows, first.negatives, first.new, first.empty) == (24, 72, new, 0)
    again = refresher.mine(embedder, 4)  # the same model finds the same
    assert (again.negatives, again.new) == (72, 0)
    assert again.told == "72 negatives for 24 queries, 0% of them new; 0 queries have none"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["refresh-4"]
    assert not (tmp_path / "run/refresh-4/vectors").exists()


def test_a_query_whose_every_document_is_too_near_has_none(source, embedder, tmp_path):
    rule = MiningRule(kind="absolute", value=-1.0)
    refresher = Refresher(
        Refresh(every=1, mining=replace(NEAREST, rule=rule)), [source], tmp_path / "run", 0
    )
    found = refresher.mine(embedder, 1)
    assert (found.negatives, found.empty, found.new_share) == (0, 24, 0.0)
    assert all(not example.negatives for example in all_of(refresher.sources[0]))


# ---- in the loop -----------------------------------------------------------------------------


def weights(embedder: Embedder) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in embedder.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_reads_new_negatives_after_every_refresh_and_says_so(
    source, recipe, tmp_path, monkeypatch
):
    batches: list[list[Example]] = []
    batch = PairsAtWork.batch

    def recorded(self: PairsAtWork, rows: Any, seed: Any) -> Any:
        batches.append(rows.examples(self.drawn))
        return batch(self, rows, seed)

    monkeypatch.setattr(PairsAtWork, "batch", recorded)
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
    "while documents are encoded": (corpus, "replacing_file", 2),
    "between two parts": (refreshing, "write_examples", 1),
    "before it is done": (refreshing, "_write_json", 4),
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


def test_what_another_model_mined_in_the_same_folder_is_not_taken(source, embedder, tmp_path):
    folder = tmp_path / "run/refresh-2"
    folder.mkdir(parents=True)
    (folder / "about.json").write_text(json.dumps({"model": "another"}))
    (folder / "refresh.json").write_text(json.dumps({"model": "another"}))
    (folder / "0-0.jsonl").write_text("stale\n")
    assert mined(embedder, [source], tmp_path / "run") == mined(
        embedder, [source], tmp_path / "fresh"
    )


def test_texts_and_a_corpus_that_is_not_there_are_refused_before_training(source, tmp_path):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    texts = open_texts(tmp_path / "texts.txt")
    with pytest.raises(RecipeError, match="holds texts, and negatives are mined for examples"):
        Refresher(Refresh(every=2), [texts], tmp_path / "run", 0)
    missing = Refresh(every=2, corpus=(str(tmp_path / "no.jsonl"),))
    with pytest.raises(RecipeError, match=r"no\.jsonl: there is no such file of documents"):
        Refresher(missing, [source], tmp_path / "run", 0)
    with pytest.raises(RecipeError, match="every is 0; give 1 or more"):
        Refresh(every=0)
    with pytest.raises(RecipeError, match="a refresh has at_least 1, but leaves out no row"):
        Refresh(every=1, mining=replace(NEAREST, at_least=1))


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
    monkeypatch.setattr(loop, "groups_of", None)  # is not asked again
    less = replace(run, memory_gb=0.05)
    assert same_bits(end, weights(train(fitted, [source], tmp_path / "run", run=less)))


# ---- several processes -----------------------------------------------------------------------


def one_of_two(folder: Path) -> None:
    """Mine as one of two processes, and write what this one reads afterwards."""
    torch.set_num_threads(1)
    distributed.start()
    with pytest.MonkeyPatch.context() as patch:
        small_parts(patch)
        wrote: list[str] = []
        write = refreshing.write_examples

        def recorded(path: Path, examples: Any) -> None:
            wrote.append(path.name)
            write(path, examples)

        patch.setattr(refreshing, "write_examples", recorded)
        source = open_source(folder / "pairs.jsonl")
        (found,) = mined(Embedder.load(folder / "base"), [source], folder / "two")
    write_examples(folder / f"{distributed.rank()}.jsonl", found)
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(wrote))
    distributed.stop()


def test_two_processes_share_the_parts_and_find_what_one_finds(tmp_path):
    source = prepare(tmp_path)
    toy.save_model(tmp_path / "base", "bert")
    run_together(__file__, str(tmp_path))
    (alone,) = mined(Embedder.load(tmp_path / "base"), [source], tmp_path / "one")
    for rank in range(2):
        assert list(iter_examples(tmp_path / f"{rank}.jsonl", "pairs")) == alone
    wrote = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert wrote == [["0-0.jsonl", "0-20.jsonl"], ["0-10.jsonl"]]


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
    one_of_two(Path(sys.argv[1])) if len(sys.argv) == 2 else alone(Path(sys.argv[1]), sys.argv[2])
