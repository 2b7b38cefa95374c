"""Likely false negatives are ignored in training, by settings of a stage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch

from tercet.data.files.sources import Source
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.objectives import contrastive
from tercet.objectives.contrastive import Contrastive
from tercet.objectives.unified import Unified
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.catalog import RECIPES
from tercet.recipes.settings import built, from_words, settings_of
from tercet.training.checkpoint import changed
from tercet.training.log import read
from tercet.training.loop import train
from tercet.training.recipe import Recipe, Refresh, Run, Stage
from tercet.training.run_report import stage_charts

QUIET = Run(device="cpu", show_progress=False, save_steps=2)
RULE: dict[str, Any] = {"ignore_rule": "margin", "ignore_value": -0.02}


def weights(embedder: Embedder) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in embedder.state_dict().items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def die_at(patch: pytest.MonkeyPatch, step: int) -> None:
    backward, done = contrastive.backward_in_chunks, []

    def dying(*args: Any, **options: Any) -> Any:
        done.append(1)
        if len(done) == step:
            raise KeyboardInterrupt
        return backward(*args, **options)

    patch.setattr(contrastive, "backward_in_chunks", dying)


def train_until_killed(recipe: Recipe, data: Source, out: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe, [data], out, run=QUIET)


def ignoring(recipe: Recipe, **changes: Any) -> Recipe:
    (stage,) = recipe.stages
    return replace(recipe, stages=(replace(stage, **{"steps": 4, **RULE} | changes),))


def test_the_log_has_the_share_that_is_ignored_and_the_report_draws_it(data, recipe, tmp_path):
    train(ignoring(recipe), [data], tmp_path / "run", run=QUIET)
    records = read(tmp_path / "run/log.jsonl")
    shares = [record["ignored"] for record in records]
    assert len(shares) == 4 and all(0 < share < 1 for share in shares)
    assert any("negatives that are ignored" in str(part) for part in stage_charts(records))
    train(ignoring(recipe, ignore_rule=None, ignore_value=None), [data], tmp_path / "no", run=QUIET)
    records = read(tmp_path / "no/log.jsonl")
    assert not any("ignored" in record for record in records)
    assert not any("negatives that are ignored" in str(part) for part in stage_charts(records))


def test_a_rule_that_nothing_exceeds_trains_the_weights_of_no_rule(data, recipe, tmp_path):
    plain = train(
        ignoring(recipe, ignore_rule=None, ignore_value=None), [data], tmp_path / "a", run=QUIET
    )
    idle = train(ignoring(recipe, ignore_value=2.0), [data], tmp_path / "b", run=QUIET)
    rule = train(ignoring(recipe), [data], tmp_path / "c", run=QUIET)
    assert same_bits(weights(plain), weights(idle))
    assert not same_bits(weights(plain), weights(rule))


@pytest.mark.parametrize("dims", [(), (16,)])
def test_chunks_that_are_embedded_twice_ignore_the_same(data, recipe, tmp_path, dims):
    objective = Contrastive(dims=dims)
    once, twice = (
        train(ignoring(recipe, objective=objective), [data], tmp_path / name, run=run)
        for name, run in (
            ("once", replace(QUIET, chunk_tokens=60)),
            ("twice", replace(QUIET, chunk_tokens=60, memory_gb=0.0)),
        )
    )
    assert same_bits(weights(once), weights(twice))


def test_a_killed_run_ignores_the_same_after_it_goes_on(data, recipe, tmp_path, monkeypatch):
    ruled = ignoring(recipe)
    whole = weights(train(ruled, [data], tmp_path / "whole", run=QUIET))
    with monkeypatch.context() as patch:
        die_at(patch, 4)
        train_until_killed(ruled, data, tmp_path / "killed")
    assert same_bits(whole, weights(train(ruled, [data], tmp_path / "killed", run=QUIET)))
    logs = [read(tmp_path / name / "log.jsonl") for name in ("whole", "killed")]
    assert [r["ignored"] for r in logs[0]] == [r["ignored"] for r in logs[1]]


def test_a_run_of_a_version_without_the_rule_goes_on():
    now = {"epochs": "1.0", "ignore_rule": "None", "ignore_own": "False"}
    assert changed({"epochs": "1.0"}, now) == ""
    assert "ignore_rule was 'None', now \"'margin'\"" in changed(
        {"epochs": "1.0"} | {"ignore_rule": "None"}, now | {"ignore_rule": repr("margin")}
    )


@pytest.mark.parametrize("name", RECIPES)
def test_each_stage_that_compares_examples_takes_the_rule(name):
    entry = RECIPES[name]
    every = {"stages": ",".join(entry.stages)} if len(entry.stages) > 1 else {}
    for stage in entry.function(**every).stages:
        prefix = f"{stage.name}." if len(entry.stages) > 1 else ""
        takes = entry.stages[stage.name].format == "examples" and stage.objective.traits.contrasts
        assert (f"{prefix}ignore_rule" in settings_of(entry)) == takes
        if takes:
            words = [f"{prefix}ignore_own=true", f"{prefix}ignore_rule=percent"]  # in any order
            given = from_words(entry, words) | every
            stages = {each.name: each for each in built(entry, given).recipe.stages}
            rule = stages[stage.name].ignoring
            assert rule is not None and (rule.kind, rule.value, rule.own) == ("percent", None, True)
            others = [each.ignoring for each in stages.values() if each.name != stage.name]
            assert others == [None] * (len(stages) - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ignore_rule": "near"}, "^ignore_rule is 'near'; choose from margin, percent$"),
        ({"ignore_value": 0.1}, "^ignore_value is given, but no rule; set ignore_rule to margin"),
        ({"ignore_value": 0.0}, "^ignore_value is given, but no rule; set ignore_rule to margin"),
        ({"ignore_own": True}, "^ignore_own is given, but no rule; set ignore_rule to margin or"),
        (
            {"ignore_rule": "margin", "in_batch": "none"},
            "^in_batch is 'none' in the stage toy, so ignore_rule has no documents of other exam",
        ),
        ({"ignore_rule": "percent", "ignore_value": 95.0}, "^ignore_value must be above 0 and"),
        ({"guide": "minilm"}, "^guide is given, but no rule; set ignore_rule to margin or percent"),
        (
            {"ignore_rule": "margin", "guide": "minilm", "refresh": Refresh(every=3)},
            "^the stage toy mines negatives during training, which a guide has not encoded; remove",
        ),
    ],
)
def test_a_stage_refuses_what_has_no_meaning(monkeypatch, changes, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks come first
    with pytest.raises(RecipeError, match=message):
        Stage(**{"name": "toy", "objective": Contrastive()} | changes)


def test_a_stage_without_comparisons_refuses_the_rule():
    retromae = bge_m3().stages[0]
    with pytest.raises(
        RecipeError, match=r"^the stage retromae compares queries with no documents"
    ):
        replace(retromae, ignore_rule="margin")


def test_kinds_without_dense_need_a_guide(data, recipe, encoder_folder, tmp_path):
    objective = Unified(kinds=("sparse", "multi"))
    with pytest.raises(RecipeError, match=r"^ignore_rule compares dense scores, which the stage "):
        ignoring(recipe, objective=objective)
    guided = ignoring(recipe, objective=objective, guide=str(encoder_folder))
    guided = replace(guided, model=replace(guided.model, kinds=("dense", "sparse", "multi")))
    train(guided, [data], tmp_path / "run", run=QUIET)
    assert all(0 < record["ignored"] < 1 for record in read(tmp_path / "run/log.jsonl"))


def test_the_base_as_guide_decides_as_the_model_does_before_it_has_learned(
    data, recipe, encoder_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(Embedder, "train", lambda self, mode=True: self)  # no dropout
    shares = []
    for name, guide in (("own", None), ("guided", str(encoder_folder))):
        ruled = ignoring(recipe, guide=guide, learning_rate=0.3)
        train(ruled, [data], tmp_path / name, run=QUIET)
        shares.append([record["ignored"] for record in read(tmp_path / name / "log.jsonl")])
    assert shares[0][0] == pytest.approx(shares[1][0], abs=1e-6)
    assert shares[0][1:] != pytest.approx(shares[1][1:], abs=1e-2)  # it learns, the guide does not


def test_a_run_goes_on_with_the_guide_that_it_began_with(
    data, recipe, encoder_folder, decoder_folder, tmp_path, monkeypatch
):
    guided = ignoring(recipe, guide=str(encoder_folder))
    whole = weights(train(guided, [data], tmp_path / "whole", run=QUIET))
    with monkeypatch.context() as patch:
        die_at(patch, 4)
        train_until_killed(guided, data, tmp_path / "killed")
    assert same_bits(whole, weights(train(guided, [data], tmp_path / "killed", run=QUIET)))
    other = ignoring(recipe, guide=str(decoder_folder))
    with pytest.raises(RecipeError, match=r"holds a run with other settings \(guide was"):
        train(other, [data], tmp_path / "killed", run=QUIET)
