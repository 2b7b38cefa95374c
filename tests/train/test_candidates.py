from dataclasses import replace

import pytest

from tercet import distributed
from tercet.data.files.sources import open_source, write_examples
from tercet.objectives.contrastive import Contrastive
from tercet.train.candidates import Candidates
from tercet.train.lengths import Groups
from tercet.train.recipe import Refresh, Stage
from tercet.types import Example

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


@pytest.mark.parametrize(
    ("policy", "seen"),
    [("all", 8 * (1.5 + 1.5)), ("positives", 8 * 1.5 + 1.5), ("none", 3.0), ("per_row", 24.0)],
)
def test_a_query_sees_its_own_documents_and_those_that_the_policy_allows(source, policy, seen):
    assert Candidates.of(replace(STAGE, in_batch=policy), [source]).in_batch(8) == seen


def test_what_a_row_says_of_itself_counts(tmp_path, source):
    write_examples(
        tmp_path / "own.jsonl", [Example(f"q{i}", ("a",), (), in_batch="none") for i in range(4)]
    )
    own = open_source(tmp_path / "own.jsonl")
    assert Candidates.of(STAGE, [own]).in_batch(8) == 1
    both = Candidates.of(STAGE, [source, replace(own, weight=3.0)])
    assert both.in_batch(8) == pytest.approx(0.25 * 24 + 0.75 * 1)


def test_negatives_that_will_be_mined_are_as_many_as_are_asked_for(source):
    found = Candidates.of(replace(STAGE, refresh=Refresh(every=2)), [source])
    assert (found.positives, found.negatives) == (1.5, 3.0)


def test_it_is_said_for_people(source, monkeypatch):
    found = Candidates.of(STAGE, [source])
    assert found.told(Groups((), (8,))) == (
        "each query is compared with about 24 documents: 1.5 that answer it, 1.5 negatives of its "
        "own, and those of the other queries"
    )
    monkeypatch.setattr(distributed, "world", lambda: 4)
    told = found.told(Groups((100,), (1_000, 8)))
    assert "about 3,000 (short texts) to 24 (long) documents" in told
    assert told.endswith("those of the other queries in all 4 processes")
    alone = Candidates.of(replace(STAGE, in_batch="none"), [source])
    assert alone.told(Groups((), (8,))).endswith("and none of other queries")
