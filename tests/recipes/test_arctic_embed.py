"""The recipe as a whole, on a tiny model: its stages, its numbers, where negatives come from."""

from pathlib import Path
from typing import Any

import pytest

from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.objectives.contrastive import Contrastive
from tercet.recipes.arctic_embed import arctic_embed
from tercet.training.loop import train
from tercet.training.optimizer import factor
from tercet.training.recipe import Recipe, Refresh, Run
from tercet.training.trainer import Trainer, collator_of
from tercet.types import Example
from tests.toy import SENTENCES

QUIET = Run(device="cpu", show_progress=False, save_steps=1)


@pytest.fixture
def pairs(tmp_path) -> list[Source]:
    rows = [Example(text.split()[-1], (text,), lang="en") for text in SENTENCES]
    write_examples(tmp_path / "pairs.jsonl", rows)
    return [open_source(tmp_path / "pairs.jsonl")]


@pytest.fixture
def mined(tmp_path) -> list[Source]:
    rows = [
        Example(t.split()[-1], (t,), (SENTENCES[(i + 1) % 12], SENTENCES[(i + 2) % 12]))
        for i, t in enumerate(SENTENCES)
    ]
    write_examples(tmp_path / "mined.jsonl", rows)
    return [open_source(tmp_path / "mined.jsonl")]


def small(base: Path, **changes: Any) -> Recipe:
    numbers: dict[str, Any] = {
        "pretraining_steps": 3,
        "finetuning_steps": 2,
        "pretraining_batch_size": 8,
        "finetuning_batch_size": 4,
        "dims": [16],
        "finetuning_negatives": 2,
        "pretraining_learning_rate": 1e-3,
    }
    return arctic_embed(model=str(base), **(numbers | changes))


def test_the_preset_of_the_paper_has_its_numbers():  # traps A14 and the table of section 8
    recipe = arctic_embed(preset="arctic-m")
    first, second = recipe.stages
    assert (first.batch_size, first.epochs, first.learning_rate) == (32_768, 3, 1e-4)
    assert (first.query_tokens, first.document_tokens) == (32, 256)
    assert (first.schedule, first.in_batch, first.mixing) == ("wsd", "per_row", "single")
    assert (second.batch_size, second.negatives, second.in_batch) == (256, 10, "none")
    assert (second.steps, second.learning_rate) == (9_342, 1e-5)
    assert (second.query_tokens, second.document_tokens) == (512, 512)
    assert first.objective == second.objective == Contrastive(temperature=0.02, dims=(256,))
    assert recipe.model.prompts == {"query": "query: ", "document": ""}
    assert recipe.model.pooling == "first"
    large = arctic_embed(preset="arctic-l").stages
    assert [stage.learning_rate for stage in large] == [3e-5, 5e-6]


def test_the_fine_tuning_is_constant_for_3342_steps_and_then_decays():  # trap A14
    stage = arctic_embed(preset="arctic-m").stages[1]
    decay = round(stage.decay * 9_342)
    rates = [factor(stage.schedule, step, 9_342, decay=decay) for step in (0, 3_342, 3_343, 9_341)]
    assert decay == 6_000
    assert rates == pytest.approx([1, 1, 5_999 / 6_000, 1 / 6_000])


def test_a_flag_counts_more_than_the_preset():
    recipe = arctic_embed(
        preset="arctic-l", pretraining_batch_size=64, finetuning_steps=5, query_prompt="q: "
    )
    assert recipe.stages[0].batch_size == 64
    assert recipe.stages[1].steps == 5
    assert recipe.model.prompts == {"query": "q: ", "document": ""}


def test_shorter_widths_in_one_stage_or_none():
    recipes = (
        (arctic_embed(), [(256,), (256,)]),
        (arctic_embed(matryoshka="finetuning"), [(), (256,)]),
        (arctic_embed(matryoshka="none"), [(), ()]),
    )
    for recipe, dims in recipes:
        assert [stage.objective for stage in recipe.stages] == [
            Contrastive(temperature=0.02, dims=each) for each in dims
        ]


def test_pairs_alone_train_both_stages_with_negatives_that_the_model_mines(
    encoder_folder, pairs, tmp_path
):
    said: list[str] = []
    trained = train(
        small(encoder_folder, finetuning_threshold=1.0),
        {"pairs": pairs, "mined": pairs},
        tmp_path / "run",
        run=QUIET,
        say=said.append,
    )
    assert any("negatives for 12 queries" in line for line in said)
    assert trained.settings.dims == (16,)
    names = [stage["stage"] for stage in trained.about["stages"]]
    assert names == ["pretraining", "finetuning"]
    assert Embedder.load(tmp_path / "run/model").settings.dims == (16,)


def test_rows_that_bring_negatives_keep_them_and_nothing_is_mined(
    encoder_folder, pairs, mined, tmp_path
):
    said: list[str] = []
    data = {"pairs": pairs, "mined": mined}
    train(small(encoder_folder), data, tmp_path / "run", run=QUIET, say=said.append)
    assert not any("negatives for" in line for line in said)
    assert not list((tmp_path / "run/2-finetuning").glob("refresh-*"))


def test_a_killed_fine_tuning_goes_on_with_the_negatives_it_mined(
    encoder_folder, pairs, tmp_path, monkeypatch
):
    data, recipe = {"pairs": pairs, "mined": pairs}, small(encoder_folder, finetuning_threshold=1.0)
    whole = train(recipe, data, tmp_path / "whole", run=QUIET)
    save = Trainer._save

    def killed_after_a_step(trainer: Trainer) -> None:
        save(trainer)
        if trainer.stage.name == "finetuning" and trainer.progress.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", killed_after_a_step)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, data, tmp_path / "run", run=QUIET)
    monkeypatch.setattr(Trainer, "_save", save)
    said: list[str] = []
    trained = train(recipe, data, tmp_path / "run", run=QUIET, say=said.append)
    assert "going on from step 1 of 2" in said
    weights = zip(whole.state_dict().values(), trained.state_dict().values(), strict=True)
    assert all(bool((one == other).all()) for one, other in weights)


def test_each_stage_cuts_texts_at_its_own_length_and_the_model_at_its_own(encoder_folder, pairs):
    embedder = Embedder.load(encoder_folder)
    first, second = small(
        encoder_folder,
        pretraining_query_tokens=4,
        pretraining_document_tokens=6,
        finetuning_max_tokens=8,
    ).stages
    long = Example("one two three four five six", ("word " * 30,))
    for stage, cut in ((first, (4, 6)), (second, (8, 8))):
        batch = collator_of(embedder, stage, lambda role, task: "")([long], [0])
        assert tuple(batch.texts.lengths) == cut
        assert batch.truncated == 2
    assert embedder.settings.document_tokens > 8


def test_a_refresh_that_never_mines_is_refused():
    with pytest.raises(RecipeError, match="neither at the start nor later"):
        Refresh(every=None)


def test_a_mined_row_that_was_left_without_negatives_starts_no_mining(
    encoder_folder, pairs, mined, tmp_path
):
    bare = mined[0].examples(range(12))
    bare[3] = Example(bare[3].query, bare[3].positives)
    write_examples(tmp_path / "mined.jsonl", bare)
    data = {"pairs": pairs, "mined": [open_source(tmp_path / "mined.jsonl")]}
    said: list[str] = []
    train(small(encoder_folder), data, tmp_path / "run", run=QUIET, say=said.append)
    assert not any("negatives for" in line for line in said)
