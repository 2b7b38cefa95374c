"""Training of all kinds together, on tiny models: BGE-M3's second stage."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import RecipeError
from tercet.kinds import KINDS, Kind
from tercet.losses.unified import Mixture, unified_loss
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks, Losses
from tercet.objectives.contrastive import PairWork
from tercet.objectives.unified import Unified
from tercet.recipes.bge_m3 import bge_m3
from tercet.training.log import read
from tercet.training.loop import train
from tercet.training.recipe import Recipe, Run
from tercet.types import Example
from tests import toy

QUIET = Run(device="cpu", show_progress=False)
WHOLE = Chunks(1 << 20)

MILD = Mixture(temperature=0.1)


def examples() -> list[Example]:
    """Rows with no negatives, with fewer and with more than a batch takes (B17)."""
    text = toy.SENTENCES
    return [
        Example(
            query=" ".join(text[i % 12].split()[:3]) + f" {i}",
            positives=(text[i % 12],),
            negatives=tuple(text[(i + j) % 12] for j in range(1, 1 + i % 4)),
            positive_scores=(2.0,),
            negative_scores=tuple(1.0 / j for j in range(1, 1 + i % 4)),
        )
        for i in range(12)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unified")
    write_examples(folder / "scored.jsonl", examples())
    write_examples(
        folder / "plain.jsonl",
        [replace(e, positive_scores=None, negative_scores=None) for e in examples()],
    )
    for kind in ("xlm-roberta", "llama"):
        config = toy.save_model(folder / kind, kind) / "config.json"
        said = json.loads(config.read_text())
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config.write_text(json.dumps(said | off))
    return folder


def recipe(folder: Path, base: str = "xlm-roberta", **changes: Any) -> Recipe:
    numbers: dict[str, Any] = {"stages": "unified", "unified_steps": 4}
    numbers |= {"unified_batch_size": 6, "unified_negatives": 2}
    numbers |= {"multi_dim": 16, "unified_learning_rate": 1e-3, "temperature": 0.1}
    return bge_m3(model=str(folder / base), **{**numbers, **changes})


def data(folder: Path, name: str = "plain") -> dict[str, list[Source]]:
    return {"examples": [open_source(folder / f"{name}.jsonl")]}


def at_work(folder: Path, base: str, objective: Unified, name: str = "plain") -> PairWork:
    from tercet.training.loop import build, prompts_of
    from tercet.training.trainer import collator_of

    torch.manual_seed(0)
    built = recipe(folder, base)
    embedder = build(built.model).double()
    assert embedder.heads.sparse is not None
    torch.nn.init.normal_(embedder.heads.sparse.weight, std=0.1)
    sources = data(folder, name)["examples"]
    collate = collator_of(embedder, built.stages[0], prompts_of(embedder.settings))
    return objective.start(embedder, sources, collate)


def gradients(work: PairWork, chunks: Chunks, step: int = 0) -> tuple[Losses, dict[str, Tensor]]:
    batch = work.collate(work.drawn[0].examples(range(6)), [0, step])
    work.embedder.zero_grad()
    losses = work.backward(batch, chunks, step)
    named = work.embedder.named_parameters()
    return losses, {n: p.grad.clone() for n, p in named if p.grad is not None}


@pytest.mark.parametrize("base", ["xlm-roberta", "llama"])
@pytest.mark.parametrize("kinds", [KINDS, ("sparse", "multi"), ("multi",)])
def test_chunks_of_any_size_equal_one_batch(folder: Path, base: str, kinds: tuple[Kind, ...]):
    """Trap B5 of BGE-M3.

    With all heads, on an encoder and on a decoder, with and without kept graphs.
    """
    work = at_work(folder, base, Unified(kinds=kinds, mixture=MILD))
    losses, expected = gradients(work, WHOLE)
    assert losses["loss"] > 0.01
    for chunks in (Chunks(12, 0), Chunks(25, 40), Chunks(12)):
        again, found = gradients(work, chunks)
        assert again["loss"] == pytest.approx(float(losses["loss"]), rel=1e-12)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-11)


def test_only_the_trained_kinds_get_a_gradient(folder: Path):
    work = at_work(folder, "xlm-roberta", Unified(kinds=("dense", "sparse"), mixture=MILD))
    _, found = gradients(work, WHOLE)
    heads = {name for name in found if name.startswith("heads.")}
    assert heads == {"heads.sparse.weight", "heads.sparse.bias"}


def test_distillation_begins_at_its_optimizer_step(folder: Path):
    """Trap B8 of BGE-M3."""
    work = at_work(folder, "xlm-roberta", Unified(mixture=MILD, distil_after=3))
    before, after = gradients(work, WHOLE, 2)[0], gradients(work, WHOLE, 3)[0]
    assert "dense_distilled" not in before and "dense_distilled" in after


def test_the_start_of_distillation_survives_a_kill(folder: Path, tmp_path: Path):
    """Trap B8 of BGE-M3: a run that was killed before that step goes on as one that never was."""

    class Killed(BaseException):
        pass

    def dying(embedder: Embedder) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:  # before step 1, after step 1, after step 2
            raise Killed
        return 0.0

    calls = 0
    built = recipe(folder, unified_distil_after=3)
    run = replace(QUIET, save_steps=1, eval_steps=1, chunk_tokens=16)  # several chunks a step
    whole = train(built, data(folder), tmp_path / "whole", run=run, score=lambda e: 0.0)
    with pytest.raises(Killed):
        train(built, data(folder), tmp_path / "killed", run=run, score=dying)
    again = train(built, data(folder), tmp_path / "killed", run=run, score=lambda e: 0.0)
    for (name, ours), theirs in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    steps = {row["step"]: row for row in read(tmp_path / "killed/log.jsonl") if "loss" in row}
    assert [step for step in steps if "dense_distilled" in steps[step]] == [4]


@pytest.mark.parametrize("base", ["xlm-roberta", "llama"])
def test_a_trained_model_is_saved_with_all_kinds_and_learned(
    folder: Path, tmp_path: Path, base: str
):
    built = recipe(folder, base, unified_steps=12, dims=[16])
    trained = train(built, data(folder), tmp_path / "run", run=QUIET)
    loaded = Embedder.load(tmp_path / "run/model")
    assert loaded.kinds == KINDS and loaded.settings.dims == (16,)
    assert loaded.fingerprint() == trained.fingerprint()
    rows = [row for row in read(tmp_path / "run/log.jsonl") if "loss" in row]
    for name in ("dense", "sparse", "multi", "sum"):
        assert rows[-1][name] < rows[0][name]
    assert {"sparse_distilled", "empty_sparse"} <= set(rows[0])


def test_heads_alone_leave_the_backbone_as_it_was(folder: Path, tmp_path: Path):
    built = recipe(folder, unified_train="heads")
    train(built, data(folder), tmp_path / "run", run=QUIET)
    base = Embedder.load(folder / "xlm-roberta")
    trained = Embedder.load(tmp_path / "run/model")
    before, after = base.backbone.model.state_dict(), trained.backbone.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trained.heads.sparse is not None and trained.heads.sparse.weight.any()
    with pytest.raises(RecipeError, match="unified_train=heads trains nothing in the other stages"):
        bge_m3(model="x", unified_train="heads")


@pytest.mark.parametrize("lesson", ["kl", "listwise"])
def test_scores_of_a_reranker_are_learned(folder: Path, tmp_path: Path, lesson: Any):
    built = recipe(folder, unified_distil=lesson, unified_steps=8)
    with_scores = train(built, data(folder, "scored"), tmp_path / "scored", run=QUIET)
    plain = recipe(folder, unified_steps=8)
    without = train(plain, data(folder), tmp_path / "plain", run=QUIET)
    assert with_scores.fingerprint() != without.fingerprint()
    rows = [row for row in read(tmp_path / "scored/log.jsonl") if "loss" in row]
    assert all(row["sum_taught"] > 0 and (row["sum"] > 0) == (lesson == "kl") for row in rows)


def test_scores_that_mining_left_in_the_rows_teach_nothing_unasked(folder: Path, tmp_path: Path):
    """They are cosines, whose softmax is nearly flat: it would hold positives back."""
    scored = train(recipe(folder), data(folder, "scored"), tmp_path / "scored", run=QUIET)
    plain = train(recipe(folder), data(folder), tmp_path / "plain", run=QUIET)
    assert scored.fingerprint() == plain.fingerprint()


def test_heads_that_a_stage_does_not_train_are_kept_as_they_are(folder: Path, tmp_path: Path):
    first = train(recipe(folder), data(folder), tmp_path / "first", run=QUIET)
    more = recipe(folder, kinds="dense,sparse")
    more = replace(more, model=replace(more.model, base=str(tmp_path / "first/model")))
    second = train(more, data(folder), tmp_path / "second", run=QUIET)
    assert Embedder.load(tmp_path / "second/model").kinds == KINDS
    assert first.heads.multi is not None and second.heads.multi is not None
    assert torch.equal(first.heads.multi.weight, second.heads.multi.weight)
    assert first.heads.sparse is not None and second.heads.sparse is not None
    assert not torch.equal(first.heads.sparse.weight, second.heads.sparse.weight)


def test_longer_texts_than_there_are_positions_are_told_of(folder: Path, tmp_path: Path, caplog):
    train(recipe(folder, document_tokens=9_000), data(folder), tmp_path / "run", run=QUIET)
    assert "document_tokens is 9000, and the model has room for" in caplog.text
    with pytest.raises(RecipeError, match="positions gives room for 300"):
        wrong = recipe(folder, document_tokens=9_000, positions=300)
        train(wrong, data(folder), tmp_path / "wrong", run=QUIET)


def test_lora_trains_the_heads_too(folder: Path, tmp_path: Path):
    train(recipe(folder, lora_rank=2), data(folder), tmp_path / "run", run=QUIET)
    loaded = Embedder.load(tmp_path / "run/model")
    assert loaded.kinds == KINDS and loaded.heads.sparse is not None
    assert loaded.heads.sparse.weight.any()


def test_stages_make_the_kinds_that_were_trained_by_then(folder: Path, tmp_path: Path):
    built = recipe(folder, stages="contrastive,unified", contrastive_steps=2, unified_steps=2)
    sources = data(folder)
    train(built, {"pairs": sources["examples"], **sources}, tmp_path / "run", run=QUIET)
    first = Embedder.load(tmp_path / "run/1-contrastive/model")
    assert first.kinds == ("dense",)
    assert not (tmp_path / "run/1-contrastive/model/sparse_linear.pt").exists()
    assert Embedder.load(tmp_path / "run/model").kinds == KINDS


def test_what_does_not_fit_is_refused(folder: Path, tmp_path: Path):
    plain = recipe(folder)
    narrow = replace(plain, model=replace(plain.model, kinds=("dense",)))
    with pytest.raises(RecipeError, match="no sparse and no multi vectors"):
        train(narrow, data(folder), tmp_path / "run", run=QUIET)
    refused: list[dict[str, Any]] = [{"kinds": ()}, {"dims": (0,)}]
    for wrong in [*refused, {"distil_after": -1}]:
        with pytest.raises(RecipeError):
            Unified(**wrong)
    with pytest.raises(RecipeError, match="every weight must be 0 or more"):
        Mixture(of_sum=-1.0)
    with pytest.raises(RecipeError, match=r"temperature is 0\.0; give"):
        Mixture(temperature=0.0)
    with pytest.raises(RecipeError, match="choose from dense, sparse, multi"):
        bge_m3(kinds="dense,colbert")


def test_the_share_of_empty_sparse_vectors_is_logged(folder: Path):
    """B18: where every weight is cut to zero, all of them are empty."""
    work = at_work(folder, "xlm-roberta", Unified(mixture=MILD))
    assert work.embedder.heads.sparse is not None
    torch.nn.init.constant_(work.embedder.heads.sparse.bias, 100.0)
    assert gradients(work, WHOLE)[0]["empty_sparse"] == 0
    torch.nn.init.constant_(work.embedder.heads.sparse.bias, -100.0)
    assert gradients(work, WHOLE)[0]["empty_sparse"] == pytest.approx(1)


def test_the_objective_is_the_loss_of_its_vectors(folder: Path):
    """The objective hands its numbers to the loss as they are."""
    work = at_work(folder, "xlm-roberta", Unified(mixture=Mixture(temperature=0.1, distilled=0.5)))
    batch = work.collate(work.drawn[0].examples(range(6)), [0, 0])
    with torch.no_grad():
        vectors = work.embedder.vectors(batch.texts)
        queries, docs = vectors.take(slice(6)), vectors.take(slice(6, None))
        mixture = Mixture(temperature=0.1, distilled=0.5)
        expected = unified_loss(queries, docs, batch.relation, mixture, queries_of_all=6)
    found = gradients(work, WHOLE)[0]
    assert found["loss"] == pytest.approx(float(expected["loss"]), rel=1e-9)
