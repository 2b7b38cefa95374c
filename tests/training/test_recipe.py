from math import inf, nan

import jaxtyping
import pytest

from tercet.errors import RecipeError
from tercet.objectives.contrastive import Contrastive
from tercet.recipes.finetune import finetune
from tercet.training.recipe import Lora, Model, Run, Stage


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("epochs", wrong) for wrong in (0.0, -1.0, nan, inf)],
        *[("learning_rate", wrong) for wrong in (0.0, -1e-5, nan)],
        *[("clip", wrong) for wrong in (0.0, nan)],
        *[(name, 0) for name in ("steps", "positives", "token_budget", "patience")],
        *[("negatives", -1), ("weight_decay", -0.1), ("weight_decay", nan)],
        *[("warmup", -0.1), ("decay", 1.1), ("warmup", nan)],
        *[("length_edges", wrong) for wrong in ((0,), (3, 3), (5, 4))],
    ],
)
def test_a_stage_refuses_impossible_numbers(name, value):
    with pytest.raises(RecipeError, match=f"^{name} (is|are) .*; give "):
        Stage(**{"name": "toy", "objective": Contrastive(), name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (Lora, "rank", 0),
        (Lora, "alpha", 0),
        (Lora, "dropout", 1.5),
        (Run, "save_minutes", 0.0),
        (Run, "chunk_tokens", 0),
        (Run, "save_steps", 0),
        (Run, "eval_steps", 0),
        (Run, "memory_gb", -1.0),
        (Contrastive, "temperature", 0.0),
        (Contrastive, "temperature", nan),
        (Contrastive, "dims", (4, 4)),
        (Contrastive, "dims", (0,)),
    ],
)
def test_so_do_the_other_parts(kind, name, value):
    with pytest.raises(RecipeError, match=f"^{name} (is|are) .*; give "):
        kind(**{name: value})


def test_an_object_that_is_not_an_objective_is_refused(monkeypatch):
    class WithoutTraits:
        def start(self, embedder, sources, collate): ...

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks come first
    with pytest.raises(RecipeError, match=r"a WithoutTraits for its objective, which must have a"):
        Stage(name="toy", objective=WithoutTraits())  # pyright: ignore[reportArgumentType]


def test_a_text_cannot_be_cut_to_its_special_tokens():
    with pytest.raises(RecipeError, match=r"^query_tokens is 3; give 4 or more"):
        Model(base="minilm", query_tokens=3)


def test_the_usual_numbers_are_possible():
    recipe = finetune(dims=[64, 128], length_edges=[32, 64], token_budget=4096)
    assert recipe.stages[0].objective == Contrastive(temperature=0.05, dims=(64, 128))
    assert recipe.stages[0].length_edges == (32, 64)
    assert recipe.stages[0].token_budget == 4096
