"""A teacher's scores in training rows."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from tercet.curate.jobs import score_job
from tercet.curate.jobs.score_job import EmbedderTeacher, ScoreJob, score_rows
from tercet.data.files.sources import iter_examples, open_source, write_examples
from tercet.errors import DataError, ModelError, RecipeError
from tercet.kinds import KINDS
from tercet.models.embedder import Embedder
from tercet.models.pairs import score_pairs
from tercet.types import Example
from tests import toy

TEXT = toy.SENTENCES
ROWS = [
    Example(
        f"question {i}",
        tuple(TEXT[(i + j) % 12] for j in range(1 + i % 2)),
        tuple(TEXT[(i + 5 + j) % 12] for j in range(i % 3)),
        positive_scores=(9.0,) if i == 2 else None,
        query_prompt="q: ",
        task="pairs",
        lang="en",
    )
    for i in range(7)
]


@dataclass
class Lengths:
    """Scores a pair by the lengths of both texts; fails after some calls."""

    calls: int = 99

    def fingerprint(self) -> str:
        return "lengths"

    def score(self, queries, documents) -> torch.Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        pairs = zip(queries, documents, strict=True)
        return torch.tensor([len(q) + len(d) / 64 for q, d in pairs])


def job(path: Path, teacher: Lengths) -> ScoreJob:
    return ScoreJob(load=lambda: teacher, fingerprint="lengths", sources=[open_source(path)])


@pytest.fixture
def rows(tmp_path) -> Path:
    write_examples(tmp_path / "pairs.jsonl", ROWS)
    return tmp_path / "pairs.jsonl"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_document_gets_its_score_and_all_else_stays(tmp_path, rows, suffix):
    report = score_rows(job(rows, Lengths()), tmp_path / f"scored.{suffix}", tmp_path / "work")
    for old, new in zip(ROWS, iter_examples(tmp_path / f"scored.{suffix}"), strict=True):
        assert new.positive_scores == tuple(len(old.query) + len(d) / 64 for d in old.positives)
        negative = tuple(len(old.query) + len(d) / 64 for d in old.negatives)
        assert new.negative_scores == (negative or None)
        same = ("query", "positives", "negatives", "query_prompt", "task", "lang")
        assert all(getattr(new, name) == getattr(old, name) for name in same)
    assert (report.rows, report.documents, report.negatives, report.replaced) == (7, 16, 6, 1)
    assert 10 < report.positive < 20 and 10 < report.negative < 20


def test_a_killed_run_scores_only_what_is_missing(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(score_job, "PART", 2)
    out, work = tmp_path / "scored.jsonl", tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        score_rows(job(rows, Lengths(calls=2)), out, work)
    assert not out.exists()
    score_rows(job(rows, Lengths(calls=2)), out, work)  # of four parts
    score_rows(job(rows, Lengths()), tmp_path / "whole.jsonl", tmp_path / "other")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    score_rows(job(rows, Lengths(calls=0)), out, work)  # over its own output


def test_inputs_and_pairs_with_a_similarity_score_are_refused(tmp_path, rows):
    with pytest.raises(RecipeError, match=r"pairs\.jsonl"):
        score_rows(job(rows, Lengths()), rows, tmp_path / "work")
    write_examples(tmp_path / "sts.jsonl", [Example("a", ("b",), score=1.0)] * 2)
    with pytest.raises(DataError, match="and scoring needs queries and what answers them"):
        score_rows(job(tmp_path / "sts.jsonl", Lengths()), tmp_path / "o.jsonl", tmp_path / "work")


def test_scores_that_are_no_numbers_are_refused(tmp_path, rows):
    class Broken(Lengths):
        def score(self, queries, documents) -> torch.Tensor:
            return torch.full((len(queries),), torch.nan)

    with pytest.raises(ModelError, match=r"rows \[0, 7\]: the model's scores contain NaN"):
        score_rows(job(rows, Broken()), tmp_path / "scored.jsonl", tmp_path / "work")


def embedder(folder: Path, **settings) -> Embedder:
    if not folder.exists():
        toy.save_model(folder, "bert")
    torch.manual_seed(0)
    return Embedder.load(folder, **settings)


@pytest.mark.parametrize("by", [None, "dense", "sparse", "multi", "hybrid"])
def test_an_embedder_scores_by_a_kind_or_by_the_sum(tmp_path, by):
    model = embedder(tmp_path / "bert", kinds=KINDS)
    queries, documents = [TEXT[0], TEXT[1]], [TEXT[2], TEXT[3]]
    expected = score_pairs(model, queries, documents)
    name = "dense+sparse+multi" if by in (None, "hybrid") else by
    found = EmbedderTeacher(model, by).score(queries, documents)
    assert torch.equal(found, expected[name])


def test_weights_of_the_sum_may_be_changed(tmp_path):
    model = embedder(tmp_path / "bert", kinds=KINDS)
    both = score_pairs(model, [TEXT[0]], [TEXT[1]])
    teacher = EmbedderTeacher(model, "hybrid", {"sparse": 0.0, "multi": 2.0})
    torch.testing.assert_close(
        teacher.score([TEXT[0]], [TEXT[1]]), both["dense"] + 2 * both["multi"]
    )
    alone = EmbedderTeacher(model, "hybrid", {"sparse": 0.0, "dense": 0.0, "multi": 2.0})
    torch.testing.assert_close(alone.score([TEXT[0]], [TEXT[1]]), 2 * both["multi"])
    assert alone.fingerprint() != teacher.fingerprint()


def test_a_dense_model_scores_by_its_cosines(tmp_path):
    model = embedder(tmp_path / "bert")
    found = EmbedderTeacher(model).score([TEXT[0]], [TEXT[1]])
    assert torch.equal(found, score_pairs(model, [TEXT[0]], [TEXT[1]])["dense"])
    with pytest.raises(RecipeError, match="the model makes no sparse vectors; it makes dense"):
        EmbedderTeacher(model, "sparse")
    with pytest.raises(RecipeError, match="weights are of a sum of kinds, and the scores are by"):
        EmbedderTeacher(model, "dense", {"multi": 1.0})
    with pytest.raises(RecipeError, match="no kind of vectors has a weight in the sum"):
        EmbedderTeacher(model, "hybrid", {"dense": 0.0})


def test_the_fingerprint_of_an_embedder_changes_with_type_attention_and_window(tmp_path):
    toy.save_model(tmp_path / "decoder", "llama")

    def found(**how) -> str:
        return EmbedderTeacher(Embedder.load(tmp_path / "decoder", **how)).fingerprint()

    ways = ({}, {"dtype": torch.bfloat16}, {"attention": "bidirectional"}, {"attention": "causal"})
    assert len({found(**how) for how in (*ways, {})}) == 3


def test_a_job_can_be_sent_to_other_processes(tmp_path, rows):
    import pickle

    sent = ScoreJob(load=partial(Lengths), fingerprint="x", sources=[open_source(rows)])
    assert len(pickle.loads(pickle.dumps(sent)).units()) == 1
