"""Runs of several stages: what of an earlier run is taken, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import ModelError, RecipeError
from tercet.kinds import KINDS
from tercet.models.choices import LayerSettings
from tercet.models.embedder import Embedder
from tercet.recipes.arctic_embed import arctic_embed
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.finetune import finetune
from tercet.recipes.llm2vec import llm2vec
from tercet.recipes.nv_embed import nv_embed
from tercet.training.checkpoint import changed
from tercet.training.loop import forecast, train
from tercet.training.plan import identity
from tercet.training.recipe import Recipe, Run
from tercet.types import Example
from tests import toy
from tests.toy import SENTENCES

QUIET = Run(device="cpu", show_progress=False)


def source_of(path: Path, ending: str = "") -> Source:
    write_examples(path, [Example(t.split()[-1] + ending, (t,)) for t in SENTENCES])
    return open_source(path)


@pytest.fixture
def data(tmp_path) -> Source:
    return source_of(tmp_path / "pairs.jsonl")


def recipe_on(base: Path, *rates: float) -> Recipe:
    """Two stages of two steps, with these learning rates."""
    plain = finetune(model=str(base), batch_size=6)
    stages = [
        replace(plain.stages[0], name=name, steps=2, learning_rate=rate)
        for name, rate in zip(("first", "second"), rates, strict=True)
    ]
    return replace(plain, stages=tuple(stages))


def refusal(recipe: Recipe, data: Source, out: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        train(recipe, [data], out, run=QUIET)
    return str(caught.value)


def vectors(folder: Path) -> list[list[float]]:
    return Embedder.load(folder).encode(SENTENCES).tolist()


LATER = ("similarity_temperature", "distil", "distil_weight", "teacher_temperature", "which_layers")


@pytest.mark.parametrize("built", [finetune(), nv_embed(), arctic_embed(), bge_m3(), llm2vec()])
def test_a_run_of_a_version_without_some_settings_is_the_same_run_with_their_defaults(data, built):
    for stage in built.stages:
        now = identity(built, stage, [data], QUIET.resolved(), begins_with={"base": "x"})
        was = {key: value for key, value in now.items() if key.rpartition(".")[2] not in LATER}
        assert changed(was, now) == ""
        for key in now.keys() - was.keys():
            assert changed(was, {**now, key: "0.7"}) == f"{key} was {now[key]!r}, now '0.7'"
        others = [key for key in was if was[key] not in ("None", "False")]
        assert all(changed({k: v for k, v in was.items() if k != key}, now) for key in others)


def test_a_slip_in_the_guide_of_a_later_stage_is_found_before_the_first_one_is_trained(
    data, encoder_folder, tmp_path
):
    recipe = recipe_on(encoder_folder, 1e-3, 1e-3)
    guided = replace(recipe.stages[1], ignore_rule="margin", guide="minilmm")
    recipe = replace(recipe, stages=(recipe.stages[0], guided))
    with pytest.raises(ModelError, match=r'there is no model "minilmm"; did you mean minilm\?'):
        train(recipe, [data], tmp_path / "run", run=QUIET)
    assert not list(tmp_path.glob("run/*/checkpoint.pt"))
    with pytest.raises(ModelError, match="minilmm"):
        forecast(recipe, [data], run=QUIET)


def test_a_stage_s_model_of_other_settings_is_no_longer_kept_when_its_checkpoint_is_gone(
    data, encoder_folder, tmp_path
):
    out = tmp_path / "run"
    train(recipe_on(encoder_folder, 1e-3, 1e-3), [data], out, run=QUIET)
    (out / "1-first/checkpoint.pt").unlink()
    (out / "2-second/checkpoint.pt").unlink()
    said = refusal(recipe_on(encoder_folder, 2e-3, 1e-3), data, out)
    assert said == (
        f"{out}/1-first/model was made with other settings (learning_rate was '0.001', now "
        f"'0.002'); give the settings it was made with, another --out, or delete {out}/1-first "
        "and those of the stages after it"
    )
    other = source_of(tmp_path / "pairs.jsonl", " more")
    assert "data pairs was '" in refusal(recipe_on(encoder_folder, 1e-3, 1e-3), other, out)


def test_the_same_settings_train_a_stage_again_whose_checkpoint_is_gone(
    data, encoder_folder, tmp_path
):
    recipe, out = recipe_on(encoder_folder, 1e-3, 1e-3), tmp_path / "run"
    train(recipe, [data], out, run=QUIET)
    before = vectors(out / "1-first/model"), vectors(out / "model")
    (out / "1-first/checkpoint.pt").unlink()
    train(recipe, [data], out, run=QUIET)
    assert (vectors(out / "1-first/model"), vectors(out / "model")) == before


@pytest.mark.parametrize("content", ["{}", "no json", '{"about": {"stages": []}}'])
def test_a_stage_s_model_that_does_not_say_what_made_it_is_not_taken(
    data, encoder_folder, tmp_path, content
):
    recipe, out = recipe_on(encoder_folder, 1e-3, 1e-3), tmp_path / "run"
    train(recipe, [data], out, run=QUIET)
    (out / "1-first/model/tercet.json").write_text(content)
    said = refusal(recipe, data, out)
    assert "1-first/model was made with other settings (it does not say with which)" in said


def test_a_stage_is_not_gone_on_with_after_the_one_before_it_was_trained_anew(
    data, encoder_folder, tmp_path
):
    """The settings of the second stage alone are what they were."""
    out = tmp_path / "run"
    train(recipe_on(encoder_folder, 1e-3, 1e-3), [data], out, run=QUIET)
    shutil.rmtree(out / "1-first")
    said = refusal(recipe_on(encoder_folder, 2e-3, 1e-3), data, out)
    assert f"{out}/2-second" in said and "stage before was '" in said
    assert "learning_rate" not in said


def test_a_base_whose_weights_have_changed_is_noticed(data, tmp_path):
    base = tmp_path / "base"
    Embedder.load(toy.save_model(tmp_path / "stock", "bert")).save(base)
    recipe, out = recipe_on(base, 1e-3, 1e-3), tmp_path / "run"
    train(recipe, [data], out, run=QUIET)
    train(recipe, [data], out, run=QUIET)  # the same base: nothing to say
    embedder = Embedder.load(base)
    weight = next(p for p in embedder.backbone.parameters() if p.ndim == 2)
    weight.data += 0.01
    embedder.save(base)
    assert "base was '" in refusal(recipe, data, out)


def test_an_edit_in_the_middle_of_any_part_of_a_base_is_noticed(data, tmp_path):
    """And what is loaded, or drawn with the recipe's seed, is not."""
    base, layer = toy.save_model(tmp_path / "base", "llama"), LayerSettings(latents=4, heads=2)
    drawn = recipe_on(base, 1e-3, 1e-3)
    drawn = replace(drawn, model=replace(drawn.model, kinds=KINDS, layer=layer))
    torch.manual_seed(0)
    embedder = Embedder.load(base, kinds=KINDS, layer=layer)
    trained = tmp_path / "trained"
    embedder.save(trained)
    kept = recipe_on(trained, 1e-3, 1e-3)
    for recipe, out in ((drawn, tmp_path / "drawn"), (kept, tmp_path / "kept")):
        train(recipe, [data], out, run=QUIET)
        torch.rand(7)  # another state of the random numbers
        train(recipe, [data], out, run=QUIET)
    for part in (embedder.backbone, embedder.heads.sparse, embedder.heads.multi, embedder.layer):
        assert part is not None
        weight = max(part.parameters(), key=torch.Tensor.numel).data.view(-1)
        before = weight[len(weight) // 2].clone()
        weight[len(weight) // 2] += 0.01
        embedder.save(trained)
        assert "base was '" in refusal(kept, data, tmp_path / "kept")
        weight[len(weight) // 2] = before
    embedder.save(trained)
    train(kept, [data], tmp_path / "kept", run=QUIET)


def test_a_model_keeps_what_each_of_its_stages_was_made_with(data, encoder_folder, tmp_path):
    train(recipe_on(encoder_folder, 1e-3, 2e-3), [data], tmp_path / "run", run=QUIET)
    saved = json.loads((tmp_path / "run/model/tercet.json").read_text())
    first, second = (stage["made_with"] for stage in saved["about"]["stages"])
    assert (first["learning_rate"], second["learning_rate"]) == ("0.001", "0.002")
    assert first["base"] == second["base"] and "stage before" not in first
    assert second["stage before"] == saved["about"]["stages"][0]["weights"]
