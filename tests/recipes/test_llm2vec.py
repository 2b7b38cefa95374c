import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t

from tercet.data.batches.masking import Masking
from tercet.data.files.sources import open_source, write_examples
from tercet.data.files.texts import open_texts
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.objectives import mntp
from tercet.objectives.contrastive import Contrastive
from tercet.objectives.mntp import MNTP
from tercet.objectives.simcse import SimCSE
from tercet.recipes.llm2vec import llm2vec
from tercet.training.log import read
from tercet.training.loop import train
from tercet.training.recipe import Run
from tercet.types import Example
from tests.toy import DECODERS, SENTENCES, byte_bpe

QUIET = Run(device="cpu", show_progress=False, save_steps=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("causal-lm")
    torch.manual_seed(3)
    t.LlamaForCausalLM(DECODERS["llama"]).save_pretrained(path)  # pyright: ignore
    byte_bpe().save_pretrained(path)
    return str(path)


@pytest.fixture
def data(tmp_path) -> dict[str, Any]:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text} number {i}\n" for i in range(3) for text in SENTENCES))
    pairs = [Example(text.split()[-1] + f" {i}", (text,)) for i, text in enumerate(SENTENCES)]
    write_examples(tmp_path / "pairs.jsonl", pairs)
    texts = [open_texts(path)]
    return {"texts": texts, "sentences": texts, "pairs": [open_source(tmp_path / "pairs.jsonl")]}


def small(base: str, **changes: Any):
    numbers = {
        "mntp_steps": 5,
        "mntp_batch_size": 4,
        "mntp_block_tokens": 32,
        "mntp_learning_rate": 3e-3,
        "simcse_steps": 5,
        "simcse_batch_size": 6,
        "supervised_steps": 4,
        "supervised_batch_size": 4,
        "lora_rank": 4,
        "query_prompt": "find: ",
    }
    return llm2vec(base, **{"stages": "mntp,simcse,supervised", **numbers, **changes})


def weights(embedder: Embedder) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in embedder.state_dict().items()}


def same_bits(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_numbers_are_those_of_the_paper():
    recipe = llm2vec("some-llama", stages="mntp,simcse,supervised")
    first, second, third = recipe.stages
    assert isinstance(first.objective, MNTP) and isinstance(second.objective, SimCSE)
    assert first.objective.masking == Masking(probability=0.2, kind="default")
    assert (first.objective.block_tokens, first.batch_size, first.steps) == (512, 32, 1_000)
    assert (first.learning_rate, first.weight_decay, first.clip) == (5e-5, 0.0, 1.0)
    assert (second.objective.temperature, second.objective.attention_dropout) == (0.05, 0.3)
    assert (second.batch_size, second.learning_rate, second.steps) == (128, 3e-5, 1_000)
    assert third.objective == Contrastive(temperature=0.02)
    assert (third.batch_size, third.learning_rate, third.warmup) == (512, 2e-4, 0.3)
    lora = recipe.model.lora
    assert lora is not None and (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.05)
    assert recipe.model.attention == "bidirectional" and not recipe.model.pool_prompt


def masking(**flags: Any) -> Masking:
    objective = llm2vec("x", **flags).stages[0].objective
    assert isinstance(objective, MNTP)
    return objective.masking


def test_presets_and_flags_choose_the_masking():
    assert masking(mntp_preset="mistral") == Masking(probability=0.8, kind="all")
    mixed = masking(mntp_preset="mistral", mntp_mask_probability=0.4)
    assert mixed == Masking(probability=0.4, kind="all")


@pytest.mark.parametrize("stages", ["", "mntp,mntp", "mntp,rest"])
def test_stages_that_do_not_exist_are_refused(stages):
    with pytest.raises(RecipeError, match="choose from mntp, simcse, supervised, each once"):
        llm2vec("x", stages=stages)


def test_every_stage_trains_and_leaves_a_model_that_reads_both_ways(base, data, tmp_path):
    trained = train(small(base), data, tmp_path / "run", run=QUIET)
    vectors = []
    for folder in ("1-mntp", "2-simcse", "3-supervised", "."):
        model = Embedder.load(tmp_path / "run" / folder / "model")
        assert model.backbone.attention == "bidirectional"
        assert model.settings.prompts == {"query": "find: "} and not model.settings.pool_prompt
        config = json.loads((tmp_path / "run" / folder / "model/config.json").read_text())
        assert config["is_causal"] is False
        vectors.append(model.encode(SENTENCES))
    assert all(np.abs(a - b).max() > 1e-4 for a, b in pairwise(vectors[:3]))
    np.testing.assert_array_equal(vectors[2], vectors[3])
    np.testing.assert_array_equal(vectors[3], trained.encode(SENTENCES))
    log = read(tmp_path / "run/1-mntp/log.jsonl")
    assert len(log) == 5 and all(0 <= record["accuracy"] <= 1 for record in log)
    assert log[-1]["loss"] < log[0]["loss"]


def test_a_saved_model_says_what_made_it(base, data, tmp_path):
    train(small(base), data, tmp_path / "run", run=QUIET)
    about = json.loads((tmp_path / "run/model/tercet.json").read_text())["about"]
    assert [stage["stage"] for stage in about["stages"]] == ["mntp", "simcse", "supervised"]
    assert all(stage["lora"] and stage["steps"] in (4, 5) for stage in about["stages"])
    assert len({stage["weights"] for stage in about["stages"]}) == 3
    assert about["base"] == base


def test_a_stage_run_alone_on_the_model_of_the_one_before_is_the_same_stage(base, data, tmp_path):
    chain = train(
        small(base, stages="mntp,simcse"),
        data_of(data, "texts", "sentences"),
        tmp_path / "chain",
        run=QUIET,
    )
    first = train(small(base, stages="mntp"), data_of(data, "texts"), tmp_path / "one", run=QUIET)
    mntp_of_chain = Embedder.load(tmp_path / "chain/1-mntp/model")
    assert same_bits(weights(first), weights(mntp_of_chain))
    # LoRA of a second stage is drawn with seed + 2; alone, the stage is the first of its run.
    recipe = replace(small(str(tmp_path / "one/model"), stages="simcse"), seed=1)
    alone = train(recipe, data_of(data, "sentences"), tmp_path / "two", run=QUIET)
    assert alone.encode(SENTENCES).shape == chain.encode(SENTENCES).shape
    about = json.loads((tmp_path / "two/model/tercet.json").read_text())["about"]
    assert [stage["stage"] for stage in about["stages"]] == ["mntp", "simcse"]


def data_of(data, *names):
    return {name: data[name] for name in names}


@pytest.mark.parametrize("killed_after", [1, 3, 6, 8, 11])
def test_a_run_killed_in_any_stage_ends_with_the_bits_of_one_that_was_not(
    base, data, tmp_path, monkeypatch, killed_after
):
    class Killed(BaseException):
        pass

    whole = weights(train(small(base), data, tmp_path / "whole", run=QUIET))
    done = []

    def dying(backward):
        def step(self, *args, **kwargs):
            if len(done) == killed_after:
                raise Killed
            done.append(1)
            return backward(self, *args, **kwargs)

        return step

    from tercet.objectives.contrastive import PairWork

    with monkeypatch.context() as patch:
        for work in (mntp.MNTPWork, PairWork):
            patch.setattr(work, "backward", dying(work.backward))
        with pytest.raises(Killed):
            train(small(base), data, tmp_path / "killed", run=QUIET)
    resumed = weights(train(small(base), data, tmp_path / "killed", run=QUIET))
    assert same_bits(whole, resumed)


def test_a_stage_without_data_and_data_without_a_stage_are_refused(base, data, tmp_path):
    with pytest.raises(RecipeError, match="the stage supervised reads pairs, and none are given"):
        train(small(base), data_of(data, "texts", "sentences"), tmp_path / "run", run=QUIET)
    with pytest.raises(RecipeError, match="pairs are given, but no stage reads them"):
        train(
            small(base, stages="mntp"), data_of(data, "texts", "pairs"), tmp_path / "a", run=QUIET
        )


def test_training_the_head_too_changes_what_is_learned_and_leaves_no_head(base, data, tmp_path):
    both = {
        flag: train(
            small(base, stages="mntp", mntp_train_head=flag),
            data_of(data, "texts"),
            tmp_path / str(flag),
            run=QUIET,
        )
        for flag in (False, True)
    }
    assert not same_bits(weights(both[False]), weights(both[True]))
    assert weights(both[True]).keys() == weights(both[False]).keys()


def test_the_tokenizer_after_mntp_reads_underscores_as_before(base, data, tmp_path):
    """A "_" that was registered as the mask token would be cut out of words as a special one."""
    train(small(base, stages="mntp"), data_of(data, "texts"), tmp_path / "run", run=QUIET)
    before, after = (t.AutoTokenizer.from_pretrained(p) for p in (base, tmp_path / "run/model"))
    for text in ("def __init__(self):", "snake_case", "_"):
        assert before(text)["input_ids"] == after(text)["input_ids"]
        assert after.decode(after(text)["input_ids"], skip_special_tokens=True) == text
    assert after.mask_token is None


def test_without_lora_every_weight_is_trained(base, data, tmp_path):
    trained = train(
        small(base, stages="mntp", lora_rank=0), data_of(data, "texts"), tmp_path / "r", run=QUIET
    )
    before = weights(Embedder.load(base, attention="bidirectional"))
    changed = [n for n, w in weights(trained).items() if not torch.equal(w, before[n])]
    assert any("layers.0.self_attn.q_proj" in n for n in changed) and len(changed) > 20


def test_smollm2_learns_from_real_texts(tmp_path):
    """Two steps on a real model: the path from texts to a model, not its quality."""
    from tercet.models.zoo import zoo

    if not zoo.installed("smollm2"):
        pytest.skip("smollm2 is not installed")
    path = Path(tmp_path / "texts.txt")
    path.write_text("\n".join(SENTENCES) + "\n")
    recipe = llm2vec(
        "smollm2", stages="mntp", mntp_steps=2, mntp_batch_size=2, mntp_block_tokens=32
    )
    trained = train(recipe, {"texts": [open_texts(path)]}, tmp_path / "run", run=QUIET)
    assert trained.backbone.attention == "bidirectional"
    losses = [record["loss"] for record in read(tmp_path / "run/log.jsonl")]
    assert all(2 < loss < 12 for loss in losses)


def test_a_run_of_other_stages_is_not_written_over(base, data, tmp_path):
    texts = data_of(data, "texts", "sentences")
    train(small(base, stages="mntp"), data_of(data, "texts"), tmp_path / "one", run=QUIET)
    before = (tmp_path / "one/model/model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match=r"holds a run of other stages \(one stage\)"):
        train(small(base, stages="mntp,simcse"), texts, tmp_path / "one", run=QUIET)
    assert (tmp_path / "one/model/model.safetensors").read_bytes() == before
    train(small(base, stages="mntp,simcse"), texts, tmp_path / "two", run=QUIET)
    with pytest.raises(RecipeError, match=r"other stages \(1-mntp, 2-simcse\)"):
        train(small(base, stages="simcse,mntp"), texts, tmp_path / "two", run=QUIET)
    with pytest.raises(RecipeError, match=r"masking\.probability was '0\.2', now '0\.4'"):
        changed = small(base, stages="mntp,simcse", mntp_mask_probability=0.4)
        train(changed, texts, tmp_path / "two", run=QUIET)
