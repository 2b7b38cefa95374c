"""Negatives that a model mines for itself by its sparse or token vectors, or by their sum."""

from dataclasses import replace
from pathlib import Path

import pytest

from tercet.curate.mining.finders import By
from tercet.curate.mining.miner import Mining, mine
from tercet.curate.mining.rules import MiningRule
from tercet.data.files.sources import Source, iter_examples
from tercet.errors import RecipeError
from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tercet.objectives.unified import Unified
from tercet.train.loop import train
from tercet.train.recipe import Refresh
from tercet.train.refresh import Refresher
from tercet.types import Example
from tests.train.refreshes import NEAREST, QUIET, prepare, recipe_for, small_parts

HYBRID = Weights(1.0, 2.0, 0.5)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    small_parts(monkeypatch)


@pytest.fixture
def source(tmp_path) -> Source:
    return prepare(tmp_path)


@pytest.fixture(scope="module")
def embedder(encoder_folder) -> Embedder:
    return Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8)


def mining_by(by: By) -> Mining:
    return replace(NEAREST, by=by, weights=HYBRID if by == "hybrid" else None)


def refreshed(embedder: Embedder, source: Source, folder: Path, by: By) -> list[Example]:
    refresher = Refresher(Refresh(every=2, mining=mining_by(by)), [source], folder, 0)
    refresher.mine(embedder, 2)
    (found,) = refresher.sources
    return found.examples(range(len(found)))


@pytest.mark.parametrize("by", ["sparse", "multi", "hybrid"])
def test_a_refresh_finds_what_mining_the_same_way_finds_and_keeps_no_scores(
    source, embedder, tmp_path, by
):
    found = refreshed(embedder, source, tmp_path / "run", by)
    out = tmp_path / "mined.jsonl"
    mine(embedder, [source], out, mining=mining_by(by), work=tmp_path / "work")
    expected = list(iter_examples(out))
    assert [e.negatives for e in found] == [e.negatives for e in expected]
    assert {e.negative_scores for e in found} == {e.positive_scores for e in found} == {None}
    dense = refreshed(embedder, source, tmp_path / "other", "dense")
    assert [e.negatives for e in dense] != [e.negatives for e in found]
    assert not list((tmp_path / "run").glob("refresh-2/vectors"))


def test_a_model_of_all_kinds_is_trained_on_negatives_by_their_sum(
    encoder_folder, source, tmp_path
):
    plain = recipe_for(encoder_folder)
    refresh = Refresh(every=2, mining=replace(mining_by("hybrid"), rule=MiningRule(kind="naive")))
    stage = replace(plain.stages[0], objective=Unified(), refresh=refresh)
    model = replace(plain.model, kinds=KINDS, multi_dim=8)
    recipe = replace(plain, model=model, stages=(stage,))
    made = train(recipe, [source], tmp_path / "run", run=QUIET)
    assert made.kinds == KINDS
    assert (tmp_path / "run/refresh-4/refresh.json").exists()


def test_a_refresh_by_bm25_is_refused():
    with pytest.raises(RecipeError, match="a refresh by bm25 finds the same each time"):
        Refresh(every=2, mining=Mining(by="bm25"))
