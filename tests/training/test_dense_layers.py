"""A linear layer after the pooling that training adds: its width, its bits, its folder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.objectives.contrastive import Contrastive
from tercet.rank.quantized import Ranges
from tercet.recipes.finetune import finetune
from tercet.training.loop import train
from tercet.training.memory import trained_numbers
from tercet.training.recipe import Lora, Model, Recipe, Run
from tests.toy import SENTENCES
from tests.training.test_loop import Killed, same_bits, stop_after, weights

QUIET = Run(device="cpu", show_progress=False, save_steps=2)
TEXTS = list(SENTENCES)


@pytest.fixture
def wide(encoder_folder: Path) -> Recipe:
    """Vectors of 96 numbers, and of 8 and 80 of them, of a network of width 64."""
    return finetune(
        model=str(encoder_folder), dense_dim=96, dims=[8, 80], batch_size=16, learning_rate=1e-3
    )


def test_a_layer_is_added_trained_and_saved(data, wide, encoder_folder, tmp_path):
    embedder = train(wide, [data], tmp_path / "run", run=QUIET)
    assert embedder.dim == 96
    assert embedder.settings.dims == (8, 80)
    torch.manual_seed(0)
    new = Embedder.load(encoder_folder)
    new.add_dense_layer(96)
    before, after = (e.dense_layers.state_dict()["0.linear.weight"] for e in (new, embedder))
    assert 1e-3 < (after - before).norm() < before.norm() / 2
    found = Embedder.load(tmp_path / "run" / "model")
    expected = embedder.encode(TEXTS)
    assert np.array_equal(found.encode(TEXTS), expected)
    peer = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    np.testing.assert_allclose(peer.encode(TEXTS), expected, atol=1e-6)


def test_a_base_of_that_width_gets_no_layer_and_another_one_a_second(data, wide, tmp_path):
    train(wide, [data], tmp_path / "first", run=QUIET)
    base = str(tmp_path / "first" / "model")
    same = replace(wide, model=replace(wide.model, base=base))
    assert len(train(same, [data], tmp_path / "same", run=QUIET).dense_layers) == 1
    other = replace(wide, model=replace(wide.model, base=base, dense_dim=80))
    found = train(other, [data], tmp_path / "other", run=QUIET)
    assert [layer.width for layer in found.settings.dense_layers] == [96, 80]


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(data, wide, tmp_path, monkeypatch):
    whole = train(wide, [data], tmp_path / "whole", run=QUIET)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(patch, 2)
        train(wide, [data], tmp_path / "killed", run=QUIET)
    found = train(wide, [data], tmp_path / "killed", run=QUIET)
    assert same_bits(weights(found), weights(whole))


def test_vectors_that_are_computed_twice_give_the_same_bits(data, wide, tmp_path):
    chunked = replace(QUIET, chunk_tokens=40)
    kept, again = (
        train(wide, [data], tmp_path / name, run=replace(chunked, memory_gb=memory))
        for name, memory in (("kept", 1.0), ("again", 0.0))
    )
    assert same_bits(weights(kept), weights(again))


def test_lora_trains_the_layer_whole(data, wide, tmp_path):
    recipe = replace(wide, model=replace(wide.model, lora=Lora(rank=2)))
    embedder = train(recipe, [data], tmp_path / "run", run=QUIET)
    gram = embedder.dense_layers.state_dict()["0.linear.weight"]
    assert (gram.T @ gram - torch.eye(64)).norm() > 1e-3  # no longer orthogonal
    assert np.array_equal(
        Embedder.load(tmp_path / "run" / "model").encode(TEXTS), embedder.encode(TEXTS)
    )


def test_the_layer_is_counted_where_memory_is_planned(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    before = trained_numbers(embedder), trained_numbers(embedder, Lora(rank=2))
    embedder.add_dense_layer(96)
    after = trained_numbers(embedder), trained_numbers(embedder, Lora(rank=2))
    assert [a - b for a, b in zip(after, before, strict=True)] == [96 * 64] * 2


def test_dims_beyond_the_layer_are_refused_before_training(data, wide, tmp_path):
    (stage,) = wide.stages
    recipe = replace(wide, stages=(replace(stage, objective=Contrastive(dims=(97,))),))
    with pytest.raises(RecipeError, match="but the model's vectors have 96 coordinates"):
        train(recipe, [data], tmp_path / "run", run=QUIET)


def test_a_width_must_be_positive(encoder_folder):
    with pytest.raises(RecipeError, match="dense_dim"):
        finetune(model=str(encoder_folder), dense_dim=0)


def test_a_width_and_a_model_of_that_width_exclude_each_other():
    with pytest.raises(RecipeError, match="dense_dim is 96, and as_wide_as takes the width of me5"):
        Model(base="minilm", dense_dim=96, as_wide_as="me5-small")


def test_a_narrower_layer_drops_the_widths_and_ranges_of_the_vectors_before(encoder_folder):
    embedder = Embedder.load(encoder_folder, dims=(16,), shares_space_with=("a",))
    ranges = {64: Ranges.learned(embedder.encode(SENTENCES))}
    embedder.settings = replace(embedder.settings, ranges=ranges, distilled_as=("b",))
    embedder.add_dense_layer(8)
    after = embedder.settings
    assert (after.dims, after.ranges) == ((), {})
    assert after.shares_space_with == after.distilled_as == ()
