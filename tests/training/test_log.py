import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tercet import distributed
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import StorageError, TrainingError
from tercet.objectives import contrastive
from tercet.objectives.contrastive import Contrastive
from tercet.recipes.finetune import finetune
from tercet.training.batches import Groups
from tercet.training.log import Candidates, FirstSteps, Log, SparseAlarm, read
from tercet.training.loop import train
from tercet.training.recipe import Refresh, Run, Stage
from tercet.types import Example
from tests.toy import SENTENCES, small_disk


def test_a_log_goes_on_behind_the_checkpoint_and_forgets_what_came_after(tmp_path):
    log = Log(tmp_path, step=0)
    for step in (1, 2, 3):
        log.write(step, loss=step / 2)
    log.close()
    log = Log(tmp_path, step=2)
    log.write(3, loss=9.0)
    log.close()
    assert read(tmp_path / "log.jsonl") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]


def test_a_last_line_that_a_kill_cut_short_is_not_read(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read(tmp_path / "log.jsonl") == [{"step": 1, "loss": 0.5}]
    assert read(tmp_path / "absent.jsonl") == []


def test_a_full_disk_is_a_storage_error_when_writing_and_when_closing(tmp_path):
    log = Log(tmp_path, step=0)
    with small_disk(100):
        with pytest.raises(StorageError, match=r"log\.jsonl: could not be written"):
            for step in range(10):
                log.write(step, loss=0.5)
        with pytest.raises(StorageError, match=r"log\.jsonl: could not be written"):
            log.close()
    assert [record["step"] for record in read(tmp_path / "log.jsonl")] == [0, 1, 2, 3]


def risen(caplog) -> list[str]:
    return [line for line in caplog.messages if "without a sparse term has risen" in line]


def test_a_slow_rise_on_the_dev_set_is_told_once_for_each_side(caplog):
    """Trap B18 of BGE-M3: no evaluation is much worse than the one before."""
    alarm = SparseAlarm()
    for step, share in enumerate([0.02, 0.0, 0.04, 0.05, 0.08, 0.12]):
        alarm.after_evaluation(step, {"dev_document_empty": share, "dev_score": 0.5})
    (told,) = caplog.messages
    assert told.startswith("step 4: the share of document texts of the dev set without a sparse")
    assert "has risen from 0.0 % to 8.0 %: the sparse head is dying; if that continues" in told
    alarm.after_evaluation(6, {"dev_document_empty": 0.2, "dev_query_empty": 0.5})
    alarm.after_evaluation(7, {"dev_document_empty": 0.2, "dev_query_empty": 0.56})
    assert len(caplog.messages) == 2 and "query texts" in caplog.messages[1]


def test_a_slow_rise_in_training_is_told_once_without_a_dev_set(caplog):
    """Trap B18 of BGE-M3."""
    alarm = SparseAlarm()
    for step in range(400):
        alarm.after_step(step, step / 1000)
    (told,) = caplog.messages
    number = int(told.split(":")[0].removeprefix("step "))
    assert 100 < number < 150 and "documents in training" in told


def test_single_batches_with_many_empty_documents_are_no_alarm(caplog):
    """Trap B18 of BGE-M3."""
    alarm = SparseAlarm()
    for step in range(400):
        alarm.after_step(step, 0.5 if step % 20 == 3 else 0.0)
    assert not caplog.messages


@pytest.mark.parametrize("documents", [4, 16])
@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
def test_a_constant_share_in_small_batches_is_no_alarm(caplog, documents, share):
    """Trap B18 of BGE-M3.

    80 runs of 300 steps; compared from the first batch on, a third of some gave an alarm.
    """
    drawn = np.random.default_rng(5).binomial(documents, share, (80, 300)) / documents
    for run in drawn.tolist():
        alarm = SparseAlarm()
        for step, empty in enumerate(run):
            alarm.after_step(step, empty)
    assert not caplog.messages


@pytest.mark.parametrize("documents", [4, 16])
def test_a_share_that_rises_to_all_is_told_of_in_small_batches_too(caplog, documents):
    """Trap B18 of BGE-M3."""
    rng = np.random.default_rng(6)
    for _ in range(20):
        alarm = SparseAlarm()
        for step in range(600):
            share = min(0.9, 0.1 + max(0, step - 200) / 250)
            alarm.after_step(step, float(rng.binomial(documents, share)) / documents)
    steps = [int(line.split(":")[0].removeprefix("step ")) for line in risen(caplog)]
    assert len(steps) == 20 and min(steps) > 200 and max(steps) < 430


def test_an_alarm_goes_on_from_what_a_checkpoint_holds(caplog):
    """Trap B18 of BGE-M3."""
    alarm = SparseAlarm()
    alarm.after_evaluation(0, {"dev_query_empty": 0.0})
    alarm = SparseAlarm(**asdict(alarm))
    alarm.after_evaluation(1, {"dev_query_empty": 0.08})
    alarm = SparseAlarm(**asdict(alarm))
    alarm.after_evaluation(2, {"dev_query_empty": 0.2})
    assert len(caplog.messages) == 1


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("killed_at", [2, 5])
def test_a_slow_rise_is_told_once_in_a_run_that_was_killed(
    encoder_folder, tmp_path, monkeypatch, caplog, killed_at
):
    """Trap B18 of BGE-M3: 0, 4, 8, 12 % of the dev texts, and a kill before or after the alarm."""
    write_examples(tmp_path / "pairs.jsonl", [Example(t.split()[-1], (t,)) for t in SENTENCES])
    source = open_source(tmp_path / "pairs.jsonl")
    recipe = finetune(model=str(encoder_folder), batch_size=6)
    recipe = replace(recipe, stages=(replace(recipe.stages[0], steps=6),))
    run = Run(device="cpu", show_progress=False, save_steps=1, eval_steps=2)
    shares = iter([0.0, 0.04, 0.08, 0.12])

    def score(_: object) -> dict[str, float]:
        share = next(shares)
        return {"dev_score": 0.5 - share, "dev_document_empty": share}

    real, calls = contrastive.backward_in_chunks, []

    def dying(*args, **options):
        if len(calls) == killed_at:
            raise Killed
        calls.append(1)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(contrastive, "backward_in_chunks", dying)
        with pytest.raises(Killed):
            train(recipe, [source], tmp_path / "run", score=score, run=run)
    assert len(risen(caplog)) == (killed_at == 5)
    train(recipe, [source], tmp_path / "run", score=score, run=run)
    (told,) = risen(caplog)
    assert told.startswith("step 4:") and "from 0.0 % to 8.0 %" in told


STAGE = Stage(name="toy", objective=Contrastive(), batch_size=8, positives=2, negatives=3)


@pytest.fixture
def source(tmp_path):
    """Of four rows two bring two positives, and two bring five negatives."""
    rows = [
        Example(f"q{i}", ("a", "b")[: 1 + i % 2], tuple(f"n{j}" for j in range(5 * (i < 2))))
        for i in range(4)
    ]
    write_examples(tmp_path / "pairs.jsonl", rows)
    return open_source(tmp_path / "pairs.jsonl")


def averages(stage: Stage, sources: list[Source]) -> Candidates:
    found = Candidates.of(stage, sources)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("policy", "seen"),
    [("all", 8 * (1.5 + 1.5)), ("positives", 8 * 1.5 + 1.5), ("none", 3.0), ("per_row", 24.0)],
)
def test_a_query_sees_its_own_documents_and_those_that_the_policy_allows(source, policy, seen):
    assert averages(replace(STAGE, in_batch=policy), [source]).in_batch(8) == seen


def test_what_a_row_says_of_itself_counts(tmp_path, source):
    write_examples(
        tmp_path / "own.jsonl", [Example(f"q{i}", ("a",), (), in_batch="none") for i in range(4)]
    )
    own = open_source(tmp_path / "own.jsonl")
    assert averages(STAGE, [own]).in_batch(8) == 1
    both = averages(STAGE, [source, replace(own, weight=3.0)])
    assert both.in_batch(8) == pytest.approx(0.25 * 24 + 0.75 * 1)


def test_negatives_that_will_be_mined_are_as_many_as_are_asked_for(source):
    found = averages(replace(STAGE, refresh=Refresh(every=2)), [source])
    assert (found.positives, found.negatives) == (1.5, 3.0)


def test_it_is_said_for_people(source, monkeypatch):
    found = averages(STAGE, [source])
    assert found.summary(Groups((), (8,))) == (
        "each query is compared with about 24 documents: 1.5 positive, 1.5 mined negatives, and "
        "those of the other queries"
    )
    monkeypatch.setattr(distributed, "world", lambda: 4)
    told = found.summary(Groups((100,), (1_000, 8)))
    assert "about 3,000 (short texts) to 24 (long) documents" in told
    assert told.endswith("those of the other queries in all 4 processes")
    alone = averages(replace(STAGE, in_batch="none"), [source])
    assert alone.summary(Groups((), (8,))).endswith("and none of other queries")


# ---- the first steps ---------------------------------------------------------------------------


def reasons(
    norms: list[float], losses: dict[str, float] | None = None, *, last: int = 100, before: int = 0
) -> list[str | None]:
    first = FirstSteps(before)
    return [first.after_step(last, norm, losses or {}) for norm in norms]


def test_a_stage_that_learns_nothing_in_ten_steps_is_stopped():
    assert reasons([0.0] * 9) == [None] * 9
    *early, said = reasons([0.0] * 10)
    assert set(early) == {None}
    assert said is not None and said.startswith("no weight got a gradient in 10 steps, so nothing")
    assert reasons([0.0] * 3, last=3)[-1] is not None  # a shorter stage
    for some in ([0.0] * 9 + [0.1], [0.1] + [0.0] * 19):
        assert set(reasons(some)) == {None}
    assert set(reasons([0.0] * 20, before=4)) == {None}  # a run that goes on has learned before


def test_a_rule_that_ignores_everything_is_named():
    assert reasons([0.0] * 10, {"ignored": 1.0})[-1] == (
        "ignore_rule ignored every document; set an ignore_value that ignores fewer"
    )


@pytest.mark.parametrize("name", ["taught", "dense_taught"])
def test_scores_that_are_never_compared_are_warned_of_once(caplog, name):
    assert set(reasons([0.1] * 20, {name: 0.0})) == {None}
    assert caplog.text.count("the first 10 steps compared no teacher's scores") == 1
    caplog.clear()
    first = FirstSteps(0)
    for step in range(20):
        first.after_step(100, 0.1, {name: float(step == 3), "multi_taught": 0.0})
    reasons([0.1] * 20, {"contrast": 1.0})  # no scores are to be learned
    assert not caplog.text


def graded(path: Path, scores: list[float]) -> Source:
    """Pairs of neighbouring sentences with these scores."""
    pairs = zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], scores, strict=True)
    lines = [json.dumps({"text1": a, "text2": b, "score": score}) for a, b, score in pairs]
    path.write_text("\n".join(lines) + "\n")
    return open_source(path)


def test_graded_pairs_train_though_the_first_batch_has_equal_scores(encoder_folder, tmp_path):
    """One of twelve differs, so two of three batches of four compare nothing."""
    run, first = Run(device="cpu", show_progress=False), list[float]()
    data = graded(tmp_path / "one.jsonl", [1.0, *[0.0] * 11])
    for seed in range(4):
        recipe = finetune(model=str(encoder_folder), steps=3, batch_size=4, seed=seed)
        train(recipe, [data], tmp_path / str(seed), run=run)
        norms = [row["gradient_norm"] for row in read(tmp_path / str(seed) / "log.jsonl")]
        assert sum(norm > 0 for norm in norms) == 1
        first.append(norms[0])
    assert 0 in first
    equal = graded(tmp_path / "equal.jsonl", [1.0] * 12)
    recipe = finetune(model=str(encoder_folder), steps=3, batch_size=4)
    with pytest.raises(TrainingError, match="no weight got a gradient in 3 steps"):
        train(recipe, [equal], tmp_path / "equal", run=run)
