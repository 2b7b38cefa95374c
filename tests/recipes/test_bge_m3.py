"""The recipe as a whole, on a tiny model: its stages, its numbers, its data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tercet.cli.train import stage_data
from tercet.data.files.sources import open_source, write_examples
from tercet.errors import RecipeError
from tercet.evaluate.measures.tuned_weights import save_weights
from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tercet.models.settings import save_ranges
from tercet.objectives.retromae import RetroMAE
from tercet.objectives.unified import Unified
from tercet.rank.quantized import Ranges
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.catalog import RECIPES
from tercet.training.log import read
from tercet.training.loop import train
from tercet.training.recipe import Recipe, Refresh, Run
from tercet.types import Example
from tests import toy

QUIET = Run(device="cpu", show_progress=False, save_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("m3")
    toy.save_model(folder / "base", "xlm-roberta")
    text = toy.SENTENCES
    rows = [
        Example(" ".join(text[i].split()[-2:]), (text[i],), (text[(i + 1) % 12],))
        for i in range(12)
    ]
    write_examples(folder / "pairs.jsonl", rows)
    return folder


def small(folder: Path, **changes: Any) -> Recipe:
    steps = {"retromae_steps": 2, "contrastive_steps": 2, "unified_steps": 3}
    sizes = {"retromae_batch_size": 4, "contrastive_batch_size": 6, "unified_batch_size": 6}
    given = {"model": str(folder / "base"), **steps, **sizes, **changes}
    return bge_m3(multi_dim=16, **given)


def data(folder: Path) -> dict[str, Any]:
    source = open_source(folder / "pairs.jsonl")
    return {"texts": [source], "pairs": [source], "examples": [source]}


def test_its_usual_numbers_are_those_of_the_paper_and_its_code():
    recipe = bge_m3()
    retromae, contrastive, unified = recipe.stages
    assert isinstance(retromae.objective, RetroMAE) and isinstance(unified.objective, Unified)
    assert (retromae.objective.encoder_mask, retromae.objective.decoder_mask) == (0.3, 0.5)
    assert retromae.learning_rate == 7e-5 and contrastive.learning_rate == 5e-5
    mixture = unified.objective.mixture
    weights = mixture.in_sum, mixture.in_loss
    assert [(w.dense, w.sparse, w.multi) for w in weights] == [(1, 0.3, 1), (1, 0.1, 1)]
    assert mixture.temperature == 0.02 and mixture.distilled == 1
    assert unified.negatives == 7 and contrastive.negatives == 0
    assert recipe.model.kinds == KINDS


def test_three_stages_killed_between_steps_end_as_if_they_had_not_been(
    folder: Path, tmp_path: Path, monkeypatch
):
    from tercet.training import trainer

    whole = train(small(folder), data(folder), tmp_path / "whole", run=QUIET)
    step, seen = trainer.Trainer._step, []

    class Killed(BaseException):
        pass

    def dying(self: Any, *given: Any) -> None:
        seen.append(1)
        if len(seen) in (2, 5, 8):  # in the middle of each stage
            raise Killed
        step(self, *given)

    monkeypatch.setattr(trainer.Trainer, "_step", dying)
    for _ in range(3):
        with pytest.raises(Killed):
            train(small(folder), data(folder), tmp_path / "killed", run=QUIET)
    again = train(small(folder), data(folder), tmp_path / "killed", run=QUIET)
    for (name, ours), theirs in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    stages = [each["stage"] for each in again.about["stages"]]
    assert stages == ["retromae", "contrastive", "unified"]
    embedder = Embedder.load(tmp_path / "killed/model")
    assert embedder.encode_vectors(toy.SENTENCES).kinds == KINDS


def test_stages_without_data_of_their_own_read_the_common_files(folder: Path):
    entry = RECIPES["bge-m3"]
    (folder / "texts.txt").write_text("\n".join(toy.SENTENCES) + "\n", encoding="utf-8")
    pairs, texts = folder / "pairs.jsonl", folder / "texts.txt"
    found = stage_data(small(folder), entry, {"": [pairs]}, "text")
    assert {name: [s.path for s in sources] for name, sources in found.items()} == {
        "examples": [pairs],
        "texts": [pairs],
        "pairs": [pairs],
    }
    found = stage_data(small(folder), entry, {"": [pairs], "retromae": [texts]}, "text")
    assert [s.path for s in found["texts"]] == [texts]


def test_options_of_the_stages_reach_them(folder: Path):
    recipe = small(
        folder,
        stages="unified",
        kinds="dense,multi",
        dims=[16, 32],
        unified_distil_after=7,
        unified_self_distillation=False,
        unified_refresh_steps=100,
        shuffle_segments=0.002,
        batching="bge-m3-80gb",
        unified_sum_loss=0.5,
    )
    (stage,) = recipe.stages
    assert isinstance(stage.objective, Unified)
    assert stage.objective.kinds == ("dense", "multi") == recipe.model.kinds
    assert stage.objective.dims == (16, 32) and stage.objective.mixture.of_sum == 0.5
    assert stage.objective.mixture.distilled == 0 and stage.objective.distil_after == 7
    assert stage.refresh is not None and stage.refresh.every == 100
    assert stage.shuffle_segments == 0.002 and stage.batching == "bge-m3-finetune-80gb"


def test_negatives_are_refreshed_by_the_scores_that_are_asked_for(folder: Path):
    usual = small(folder, unified_refresh_steps=100).stages[-1].refresh
    assert usual is not None and usual == Refresh(every=100)
    summed = small(
        folder,
        unified_refresh_steps=9,
        unified_refresh_by="hybrid",
        unified_sum_weights="1,0.5,0.2",
    )
    assert summed.stages[-1].refresh == Refresh(
        every=9, mining=replace(usual.mining, by="hybrid", weights=Weights(1.0, 0.5, 0.2))
    )
    fewer = (
        small(folder, unified_refresh_steps=9, unified_refresh_by="hybrid", kinds="sparse")
        .stages[-1]
        .refresh
    )
    assert fewer is not None and fewer.mining.weights == Weights(1.0, 0.3, 0.0)
    with pytest.raises(RecipeError, match="refresh_by is sparse, but nothing is refreshed"):
        small(folder, unified_refresh_by="sparse")
    for by in ("hybrid", "sparse"):
        with pytest.raises(RecipeError, match=f"refresh_by is {by}, but the model makes no sparse"):
            small(folder, unified_refresh_steps=9, unified_refresh_by=by, kinds="dense,multi")


def test_a_rerankers_scores_and_refreshed_negatives_do_not_go_together(folder: Path):
    for lesson in ("kl", "listwise"):
        with pytest.raises(RecipeError, match="a refresh mines have none"):
            small(folder, unified_refresh_steps=100, unified_distil=lesson)


def test_retromae_goes_on_from_an_adapter_though_its_head_is_not_there(
    folder: Path, tmp_path: Path
):
    embedder = Embedder.load(folder / "base")
    embedder.backbone.add_lora(rank=2, alpha=4, dropout=0.0)
    embedder.save_adapter(tmp_path / "adapter", str(folder / "base"))
    built = small(folder, stages="retromae", model=str(tmp_path / "adapter"))
    train(built, {"texts": data(folder)["texts"]}, tmp_path / "run", run=QUIET)
    assert (tmp_path / "run/model/tercet.json").exists()


def test_tuned_weights_outlive_the_same_command_and_no_further_training(
    folder: Path, tmp_path: Path
):
    built, examples = small(folder, stages="unified"), {"examples": data(folder)["examples"]}
    run, tuned = tmp_path / "run/model", {"": Weights(0.5, 0.1, 0.4)}
    train(built, examples, tmp_path / "run", run=QUIET)
    save_weights(run, tuned[""])
    save_ranges(run, {1: Ranges((0.0,), 0.3, 0.2, 0.1)})
    train(built, examples, tmp_path / "run", run=QUIET)
    assert Embedder.load(run).settings.weights == tuned
    said: list[str] = []
    more = replace(built, model=replace(built.model, base=str(run)))
    train(more, examples, tmp_path / "more", run=QUIET, say=said.append)
    trained = Embedder.load(tmp_path / "more/model").settings
    assert (trained.weights, trained.ranges) == ({}, {})
    assert any("drops the base's tuned weights" in line for line in said)
    assert any("drops the base's ranges of codes" in line for line in said)


def test_a_kill_before_the_model_is_saved_leaves_no_older_one(
    folder: Path, tmp_path: Path, monkeypatch
):
    examples = {"examples": data(folder)["examples"]}
    train(small(folder, stages="unified"), examples, tmp_path / "run", run=QUIET)
    (tmp_path / "run/checkpoint.pt").unlink()

    def dying(*given: Any) -> None:
        raise KeyboardInterrupt

    built = small(folder, stages="unified", seed=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Embedder, "save", dying)
        train(built, examples, tmp_path / "run", run=QUIET)
    trained = train(built, examples, tmp_path / "run", run=QUIET)
    assert Embedder.load(tmp_path / "run/model").fingerprint() == trained.fingerprint()


def test_mcls_is_trained_and_kept(folder: Path, tmp_path: Path):
    built = small(folder, stages="unified", pooling="first", cls_every=4)
    examples = {"examples": data(folder)["examples"]}
    train(built, examples, tmp_path / "run", run=QUIET)
    assert Embedder.load(tmp_path / "run/model").settings.cls_every == 4
    with pytest.raises(RecipeError, match="first"):
        wrong = replace(built, model=replace(built.model, pooling="mean"))
        train(wrong, examples, tmp_path / "wrong", run=QUIET)


def test_the_log_shows_every_loss(folder: Path, tmp_path: Path):
    examples = {"examples": data(folder)["examples"]}
    train(small(folder, stages="unified"), examples, tmp_path / "run", run=QUIET)
    row = next(row for row in read(tmp_path / "run/log.jsonl") if "loss" in row)
    names = {"dense", "sparse", "multi", "sum", "empty_sparse"}
    assert names | {f"{kind}_distilled" for kind in KINDS} <= set(row)


def test_a_longer_table_of_positions_is_trained_and_kept(folder: Path, tmp_path: Path):
    built = small(folder, stages="unified", positions=300)
    examples = {"examples": data(folder)["examples"]}
    before = Embedder.load(folder / "base").backbone.max_tokens
    train(built, examples, tmp_path / "run", run=QUIET)
    loaded = Embedder.load(tmp_path / "run/model")
    assert before < 300 == loaded.backbone.max_tokens == loaded.settings.document_tokens
    assert loaded.encode([" ".join(toy.SENTENCES * 5)]).shape == (1, loaded.dim)


def test_what_does_not_fit_together_is_refused_before_anything_is_trained(
    folder: Path, tmp_path: Path
):
    with pytest.raises(RecipeError, match="LoRA"):
        small(folder, stages="unified", unified_train="heads", lora_rank=2)
    with pytest.raises(RecipeError, match="LoRA"):
        small(folder, positions=300, lora_rank=2)
    with pytest.raises(RecipeError, match="counts in the sum"):
        small(folder, unified_sum_weights="0,0,0")
    with pytest.raises(RecipeError, match="three numbers"):
        small(folder, unified_sum_weights="1,2")
    with pytest.raises(RecipeError, match="dims are of dense vectors"):
        small(folder, kinds="sparse,multi", dims=[16])
    with pytest.raises(RecipeError, match=r"dims are \[4000\], but .*stage contrastive"):
        train(small(folder, dims=[4_000]), data(folder), tmp_path / "run", run=QUIET)
    assert not (tmp_path / "run/1-retromae").exists()


def test_heads_that_stay_behind_are_told_of(folder: Path, tmp_path: Path, caplog):
    examples = {"examples": data(folder)["examples"]}
    train(small(folder, stages="unified"), examples, tmp_path / "all", run=QUIET)
    base = str(tmp_path / "all/model")
    more = bge_m3(
        model=base, stages="unified", kinds="dense,sparse", unified_steps=1, unified_batch_size=6
    )
    train(more, examples, tmp_path / "some", run=QUIET)
    assert "trains the network and not its layers for multi vectors" in caplog.text


def test_a_stage_alone_reads_its_own_data(folder: Path):
    entry = RECIPES["bge-m3"]
    (folder / "own.txt").write_text("\n".join(toy.SENTENCES) + "\n", encoding="utf-8")
    alone = small(folder, stages="retromae")
    found = stage_data(alone, entry, {"retromae": [folder / "own.txt"]}, "text")
    assert list(found) == ["texts"]
    with pytest.raises(RecipeError, match="the stage unified needs examples, but no data"):
        stage_data(small(folder, stages="unified"), entry, {}, "text")
