"""Settings by name: values, errors, files, and the recipe that they make."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tercet.errors import DataError, RecipeError
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.catalog import RECIPES
from tercet.recipes.flags import divided
from tercet.recipes.settings import built, from_file, from_words, settings_of
from tercet.training.recipe import Run

M3, FINETUNE = RECIPES["bge-m3"], RECIPES["finetune"]


@pytest.mark.parametrize("entry", RECIPES.values(), ids=RECIPES)
def test_the_stages_of_the_catalog_are_those_of_the_recipe(entry):
    every = {} if len(entry.stages) == 1 else {"stages": ",".join(entry.stages)}
    stages = entry.function(**every).stages
    assert {stage.name: stage.data for stage in stages} == {
        name: reads.mixture for name, reads in entry.stages.items()
    }


@pytest.mark.parametrize("entry", RECIPES.values(), ids=RECIPES)
def test_defaults_of_all_settings_make_the_default_recipe(entry):
    """What --explain shows is what runs: given back one by one, nothing changes."""
    settings = settings_of(entry)
    running = {stage.name for stage in entry.function().stages}
    given = {
        name: setting.default
        for name, setting in settings.items()
        if setting.part in ("", "run") or setting.part in running
    }
    made = built(entry, given)
    assert replace(made.recipe, settings={}) == replace(entry.function(), settings={})
    assert made.run == Run()


def test_each_setting_has_a_meaning_that_is_a_sentence():
    for entry in RECIPES.values():
        for setting in settings_of(entry).values():
            assert setting.meaning[0].isupper() and setting.meaning.endswith("."), setting


def test_a_setting_reaches_its_stage_its_objective_and_the_run():
    words = ["unified.negatives=3", "contrastive.weight_decay=0.2", "temperature=0.1", "steps=30"]
    words += ["dims=64,128", "run.models_at=0,5", "unified.self_distillation=false", "pooling=none"]
    made = built(M3, from_words(M3, words))
    retromae, contrastive, unified = made.recipe.stages
    assert (unified.negatives, contrastive.weight_decay, retromae.weight_decay) == (3, 0.2, 0.01)
    assert [stage.steps for stage in made.recipe.stages] == [10, 10, 10]
    expected = bge_m3(
        steps=30,
        temperature=0.1,
        dims=[64, 128],
        unified_negatives=3,
        unified_self_distillation=False,
    )
    assert unified == expected.stages[2] and retromae == expected.stages[0]
    assert made.run.models_at == (0, 5)


def test_the_only_stage_of_a_recipe_need_not_be_named():
    assert from_words(FINETUNE, ["contrastive.warmup=0.2"]) == from_words(FINETUNE, ["warmup=0.2"])


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        (
            "unifed.negatives=3",
            "there is no setting 'unifed.negatives' (did you mean \"unified.neg",
        ),
        ("negatives=3", "there is no setting 'negatives' (did you mean \"unified.negatives\"?)"),
        ("retromae.negatives=3", "there is no setting 'retromae.negatives'"),
        ("unified.negatives=x", "unified.negatives must be a whole number; got 'x'"),
        ("unified.negatives=1.5", "unified.negatives must be a whole number; got '1.5'"),
        ("pooling=frist", "pooling must be one of mean, weighted_mean, first, last or none; got"),
        ("unified.self_distillation=1", "unified.self_distillation must be true or false; got '1'"),
        ("dims=64,x", "dims must be a list of whole numbers, as in 64,128 or none; got '64,x'"),
        ("temperature=", "temperature must be a number; got ''"),
        ("seed", "--set must be NAME=VALUE, as in --set seed=1; got 'seed'"),
    ],
)
def test_a_wrong_name_or_value_is_refused_with_what_is_near(word, problem):
    with pytest.raises(RecipeError) as caught:
        from_words(M3, [word])
    assert str(caught.value).startswith(problem)


def test_a_setting_given_twice_or_of_a_stage_that_does_not_run_is_refused():
    with pytest.raises(RecipeError, match="--set gives seed twice; remove one"):
        from_words(M3, ["seed=1", "seed=2"])
    for word in ("retromae.steps=5", "retromae.weight_decay=0.1"):
        given = from_words(M3, ["stages=unified", word])
        with pytest.raises(RecipeError, match=r"the stage retromae does not run \(stages: unified"):
            built(M3, given)


def test_a_file_gives_the_same_as_words(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(
        "dims = [64]\ntemperature = 1\n[unified]\nnegatives = 3\n[run]\nsave_minutes=2\n"
    )
    words = ["dims=64", "temperature=1", "unified.negatives=3", "run.save_minutes=2"]
    assert from_file(M3, "bge-m3", file) == from_words(M3, words)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dims = 64", "dims must be a list of whole numbers, as in 64,128 or none; got 64"),
        ("seed = true", "seed must be a whole number; got True"),
        ("seed = '1'", "seed must be a whole number; got '1'"),
        ("[unified]\nnegatvies = 3", "there is no setting 'unified.negatvies' (did you mean"),
        ('recipe = "finetune"', "is for another recipe than bge-m3"),
        ("seed = ", "cannot be read as settings: "),
    ],
)
def test_a_wrong_file_of_settings_is_named_with_what_is_wrong(tmp_path, text, problem):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises((RecipeError, DataError)) as caught:
        from_file(M3, "bge-m3", tmp_path / "run.toml")
    assert str(caught.value).startswith(f"{tmp_path}/run.toml: ") and problem in str(caught.value)


def recorded(path: Path, made) -> Path:
    record = {"recipe": asdict(made.recipe), "run": asdict(made.run)}
    path.write_text(json.dumps(record, default=str))
    return path


def test_the_record_of_a_run_makes_its_recipe_again_but_not_its_machine(tmp_path):
    words = [
        "stages=unified",
        "steps=7",
        "unified.warmup=0.3",
        "run.device=cpu",
        "run.save_steps=4",
    ]
    made = built(M3, from_words(M3, words))
    again = built(M3, from_file(M3, "bge-m3", recorded(tmp_path / "recipe.json", made)))
    assert replace(again.recipe, settings={}) == replace(made.recipe, settings={})
    assert again.run == Run(save_steps=4)


def test_the_record_of_a_recipe_that_was_changed_in_python_is_refused(tmp_path):
    made = built(M3, {})
    stages = (replace(made.recipe.stages[0], clip=3.0), *made.recipe.stages[1:])
    changed = replace(made, recipe=replace(made.recipe, stages=stages))
    with pytest.raises(RecipeError, match=r"make another recipe now .*; it was changed in Python"):
        from_file(M3, "bge-m3", recorded(tmp_path / "recipe.json", changed))
    (tmp_path / "old.json").write_text('{"recipe": {"name": "bge-m3"}, "run": {}}')
    with pytest.raises(RecipeError, match="holds no settings; give the recipe"):
        from_file(M3, "bge-m3", tmp_path / "old.json")


@pytest.mark.parametrize(
    ("steps", "stages", "parts"),
    [
        (None, "a,b,c", (1_000, 1_000, 1_000)),
        (300, "a,b,c", (225, 50, 25)),
        (10, "a,b,c", (7, 2, 1)),
        (3, "a,b,c", (1, 1, 1)),
        (40, "b,c", (1_000, 27, 13)),
    ],
)
def test_a_budget_is_divided_by_shares_and_no_stage_gets_nothing(steps, stages, parts):
    shares = {"a": 9, "b": 2, "c": 1}
    assert tuple(divided(steps, stages, shares, {}).values()) == parts
    own = divided(steps, stages, shares, {"b": 7, "c": None})
    assert own == {**dict(zip("abc", parts, strict=True)), "b": 7}


def test_a_budget_with_fewer_steps_than_stages_is_refused():
    with pytest.raises(
        RecipeError, match=r"steps must be at least 3, one for each stage .*; got 2"
    ):
        bge_m3(steps=2)


@pytest.mark.parametrize("name", RECIPES)
def test_steps_are_the_budget_of_the_whole_run_in_every_recipe(name):
    entry = RECIPES[name]
    assert sum(stage.steps or 0 for stage in entry.function(steps=41).stages) == 41
