"""What a run says that it will do, against what it does."""

from dataclasses import replace

import pytest
import torch

from tercet.data.files.sources import open_source, write_examples
from tercet.errors import RecipeError
from tercet.objectives.contrastive import PairWork
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.finetune import finetune
from tercet.recipes.llm2vec import llm2vec
from tercet.training import log
from tercet.training.forecast import lines_of
from tercet.training.loop import forecast, train
from tercet.training.recipe import Run
from tercet.types import Example
from tests.toy import SENTENCES, save_model

QUIET = Run(device="cpu", show_progress=False)


@pytest.fixture
def source(tmp_path):
    rows = [
        Example(f"{text.split()[-1]} {i}", (f"{text} {i}",), (SENTENCES[i],))
        for i in range(3)
        for text in SENTENCES
    ]
    write_examples(tmp_path / "pairs.jsonl", rows)
    return open_source(tmp_path / "pairs.jsonl")


def test_steps_batch_candidates_and_tokens_are_those_of_the_run(encoder_folder, source, tmp_path):
    recipe = finetune(model=str(encoder_folder), batch_size=8, negatives=1)
    (expected,) = forecast(recipe, [source], run=QUIET)
    train(recipe, [source], tmp_path / "run", run=QUIET)
    steps = [record for record in log.read(tmp_path / "run/log.jsonl") if "loss" in record]
    assert expected.steps == len(steps) == 5
    assert expected.batch == "8 examples" and expected.candidates == "16"
    whole = [record["tokens"] for record in steps if record["examples"] == 8]
    assert expected.tokens == pytest.approx(sum(whole) / len(whole), rel=0.15)
    assert expected.seconds is not None and expected.seconds > 0


def test_each_stage_is_described_before_the_first_is_trained(source, tmp_path):
    base = str(save_model(tmp_path / "base", "xlm-roberta"))
    recipe = bge_m3(model=base, steps=7, retromae_max_tokens=32, retromae_batch_size=4)
    data = {"texts": [source], "pairs": [source], "examples": [source]}
    found = forecast(recipe, data, run=QUIET)
    assert [each.stage for each in found] == ["retromae", "contrastive", "unified"]
    assert [each.steps for each in found] == [3, 2, 2]
    assert found[0].tokens == 4 * 32 and found[0].candidates == "-"
    assert found[2].candidates == "72"  # 36 rows: a positive and a negative each
    first, header, *rows, machine = lines_of(found)
    assert first.startswith("plan: 3 stages, about ") and len(rows) == 3
    assert header.split()[:3] == ["stage", "reads", "steps"]
    assert machine == "  on cpu in float32, 2,048 tokens encoded together"


def test_stages_that_are_encoded_in_other_ways_are_named(source, tmp_path):
    base = str(save_model(tmp_path / "base", "xlm-roberta"))
    recipe = bge_m3(model=base, steps=7, retromae_max_tokens=32, retromae_batch_size=4)
    data = {"texts": [source], "pairs": [source], "examples": [source]}
    found = forecast(recipe, data, run=replace(QUIET, checkpoint_activations=True))
    how = "on cpu in float32, 2,048 tokens encoded together, layers computed again in the backward"
    assert lines_of(found)[-1] == f"  {how}"
    other = replace(found[0], machine="cpu in bfloat16")
    assert lines_of([other, *found[1:]])[-2:] == [
        "  retromae on cpu in bfloat16",
        f"  contrastive, unified {how}",
    ]


def test_a_stage_that_cannot_work_is_refused_before_the_first_is_trained(source, tmp_path):
    base = str(save_model(tmp_path / "base", "xlm-roberta"))
    recipe = bge_m3(model=base, steps=6, unified_batch_size=8)
    stages = (*recipe.stages[:2], replace(recipe.stages[2], batch_size=1))
    data = {"texts": [source], "pairs": [source], "examples": [source]}
    with pytest.raises(RecipeError, match="batch_size must be at least 2, got 1"):
        train(replace(recipe, stages=stages), data, tmp_path / "run", run=QUIET)
    assert not list((tmp_path / "run").glob("*-retromae"))


def test_a_forecast_changes_no_random_number_and_no_weight(encoder_folder, source, monkeypatch):
    """A run that begins after it is the run that begins without it."""
    from tercet.training import loop

    seen = []
    begin, batch = loop.forecast_stages, PairWork.batch

    def drawing(self, rows, seed):
        torch.rand(1)  # as an objective may
        return batch(self, rows, seed)

    def watched(plan, embedder):
        before = {name: value.clone() for name, value in embedder.state_dict().items()}
        settings, state = embedder.settings, torch.get_rng_state()
        found = begin(plan, embedder)
        after = embedder.state_dict()
        seen.append(all(torch.equal(before[name], after[name]) for name in before))
        seen.append(settings == embedder.settings)
        seen.append(torch.equal(state, torch.get_rng_state()))
        return found

    monkeypatch.setattr(PairWork, "batch", drawing)
    monkeypatch.setattr(loop, "forecast_stages", watched)
    forecast(finetune(model=str(encoder_folder), batch_size=8), [source], run=QUIET)
    assert seen == [True, True, True]


def test_texts_in_two_views_count_twice(decoder_folder, source):
    recipe = llm2vec(str(decoder_folder), stages="simcse", steps=2, simcse_batch_size=6)
    (found,) = forecast(recipe, {"sentences": [source]}, run=QUIET)
    assert found.batch == "6 texts" and found.steps == 2 and found.tokens > 6 * 2
