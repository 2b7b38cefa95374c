"""Contrastive training with pairs that have a similarity score."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tercet.data.batches.collate import Batch, Collator
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import DataError, RecipeError
from tercet.losses.info_nce import info_nce
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.objectives.contrastive import Contrastive
from tercet.recipes.arctic_embed import arctic_embed
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.finetune import finetune
from tercet.recipes.nv_embed import nv_embed
from tercet.training.batches import collator_of
from tercet.training.log import read
from tercet.training.loop import forecast, train
from tercet.training.recipe import Recipe, Run
from tercet.types import Example
from tercet.vectors import Vectors
from tests import toy

QUIET = Run(device="cpu", show_progress=False)
TEXT = toy.SENTENCES
PAIRS = [
    Example(TEXT[i % 12], (f"{TEXT[(i * 5 + 1) % 12]} {i}",), task="sts", score=float(i % 6))
    for i in range(18)
]
EXAMPLES = [Example(f"{TEXT[i % 12].split()[-1]} {i}", (f"{TEXT[i % 12]} {i}",)) for i in range(18)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("contrastive")
    toy.save_model(folder / "bert", "bert")
    write_examples(folder / "scored.jsonl", PAIRS)
    write_examples(folder / "pairs.jsonl", EXAMPLES)
    return folder


def sources(folder: Path, *names: str) -> list[Source]:
    return [open_source(folder / f"{name}.jsonl") for name in names]


def recipe(folder: Path, **changes: Any) -> Recipe:
    settings = {"batch_size": 6, "steps": 4, "mixing": "blended", **changes}
    return finetune(model=str(folder / "bert"), **settings)


def collator(folder: Path, **changes: Any) -> Collator:
    stage = recipe(folder, **changes).stages[0]
    return collator_of(Embedder.load(folder / "bert"), stage, lambda role, task: f"{role}: ")


def cosines(first: Tensor, second: Tensor) -> Tensor:
    return (F.normalize(first, dim=1) * F.normalize(second, dim=1)).sum(1)


def slow_cosent(found: Tensor, pairs: list[Example], temperature: float) -> Tensor:
    total = torch.ones((), dtype=found.dtype)
    for i, one in enumerate(pairs):
        for j, other in enumerate(pairs):
            assert one.score is not None and other.score is not None
            if one.task == other.task and one.score > other.score:
                total = total + ((found[j] - found[i]) / temperature).exp()
    return total.log()


@pytest.mark.parametrize("dims", [(), (4, 9)])
def test_a_batch_of_both_gets_the_sum_of_both_losses(folder: Path, dims: tuple[int, ...]):
    """Each loss sees its own texts only, over each width."""
    others = [
        replace(pair, task="news", score=(pair.score or 0.0) * 7 - 50) for pair in PAIRS[6:10]
    ]
    mixed = [EXAMPLES[0], *PAIRS[:5], EXAMPLES[1], *others, EXAMPLES[2]]
    batch = collator(folder)(mixed, [0])
    assert len(batch.texts) == 3 + 3 + 2 * 9 and batch.queries == 3 and len(batch.pairs) == 9
    random = torch.Generator().manual_seed(1)
    dense = torch.randn(len(batch.texts), 16, generator=random, dtype=torch.float64)
    dense.requires_grad_()
    objective = Contrastive(temperature=0.1, dims=dims, similarity_temperature=0.2)
    found = objective.loss(Vectors(dense), batch)
    widths = [*dims, 16]
    queries, documents = F.normalize(dense[:3], dim=1), F.normalize(dense[3:6], dim=1)
    contrast = info_nce(
        queries, documents, batch.relation, 0.1, dims=widths if len(widths) > 1 else None
    )
    scored = [example for example in mixed if example.score is not None]
    first, second = dense[6:15], dense[15:]
    ranked = torch.stack(
        [slow_cosent(cosines(first[:, :d], second[:, :d]), scored, 0.2) for d in widths]
    ).mean()
    torch.testing.assert_close(found["similarity"], ranked, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["loss"], contrast + ranked, rtol=1e-12, atol=1e-12)
    (by_found,) = torch.autograd.grad(found["loss"], dense)
    (by_expected,) = torch.autograd.grad(contrast + ranked, dense)
    torch.testing.assert_close(by_found, by_expected, rtol=1e-9, atol=1e-12)


def test_a_batch_without_scored_pairs_has_the_loss_that_it_had(folder: Path):
    batch = collator(folder)(EXAMPLES[:4], [0])
    dense = torch.randn(8, 16)
    found = Contrastive(temperature=0.1).loss(Vectors(dense), batch)
    unit = F.normalize(dense, dim=1)
    assert found.keys() == {"loss"}
    assert torch.equal(found["loss"], info_nce(unit[:4], unit[4:], batch.relation, 0.1))


def test_a_batch_of_scored_pairs_alone_ranks_them(folder: Path):
    """InfoNCE would warn that no query has a positive."""
    batch = collator(folder)(PAIRS[:6], [0])
    dense = torch.randn(12, 16, dtype=torch.float64)
    found = Contrastive(similarity_temperature=0.1).loss(Vectors(dense), batch)
    expected = slow_cosent(cosines(dense[:6], dense[6:]), PAIRS[:6], 0.1)
    torch.testing.assert_close(found["loss"], expected)


def test_both_texts_of_a_pair_are_read_as_queries(folder: Path):
    embedder = Embedder.load(folder / "bert")
    pair = replace(PAIRS[1], query_prompt="alike: ")
    batch = collator(folder)([pair, PAIRS[2]], [0])
    prompts = ["alike: ", "query: ", "alike: ", "query: "]
    texts = [pair.query, PAIRS[2].query, pair.positives[0], PAIRS[2].positives[0]]
    expected = embedder.tokenize(texts, "query", prompts).pack()
    assert torch.equal(batch.texts.ids, expected.ids)


@pytest.mark.parametrize("mixing", ["single", "blended"])
def test_scored_pairs_are_learned_beside_examples(folder: Path, tmp_path: Path, mixing: str):
    built = recipe(folder, mixing=mixing, steps=12)
    said: list[str] = []
    train(built, sources(folder, "scored", "pairs"), tmp_path / "run", run=QUIET, say=said.append)
    rows = [row for row in read(tmp_path / "run/log.jsonl") if "loss" in row]
    ranked = [row for row in rows if "similarity" in row]
    assert ranked and (len(ranked) == len(rows)) == (mixing == "blended")
    assert "18 of the rows are pairs with a similarity score, and learn its order (CoSENT)" in said
    others = 4 if mixing == "blended" else 6
    assert any(f"compared with about {others} documents: 1 positive" in line for line in said)


def test_scored_pairs_move_the_cosines_towards_their_order(folder: Path, tmp_path: Path):
    built = recipe(folder, steps=30, batch_size=18, learning_rate=1e-3)
    train(built, sources(folder, "scored"), tmp_path / "run", run=QUIET)
    rows = [row["loss"] for row in read(tmp_path / "run/log.jsonl") if "loss" in row]
    assert rows[-1] < 0.8 * rows[0]


def test_a_killed_run_with_scored_pairs_goes_on_to_the_bit(folder: Path, tmp_path: Path):
    class Killed(BaseException):
        """In the middle of a run."""

    def better(embedder: Embedder) -> float:
        return float(next(measured))  # so that the last weights stay

    def dying(embedder: Embedder) -> float:
        if (tmp_path / "killed/checkpoint.pt").exists():
            raise Killed
        return better(embedder)

    measured = itertools.count()
    built, data = recipe(folder), sources(folder, "scored", "pairs")
    run = replace(QUIET, save_steps=1, eval_steps=1)
    whole = train(built, data, tmp_path / "whole", run=run, score=better)
    with pytest.raises(Killed):
        train(built, data, tmp_path / "killed", run=run, score=dying)
    again = train(built, data, tmp_path / "killed", run=run, score=better)
    base = Embedder.load(folder / "bert")
    assert again.fingerprint() == whole.fingerprint() != base.fingerprint()


def test_chunks_do_not_change_the_gradient(folder: Path):
    embedder = Embedder.load(folder / "bert").eval()
    work = Contrastive().start(embedder, [], collator(folder))
    batch = work.collate([*PAIRS[:6], *EXAMPLES[:3]], [0])
    found: list[list[Tensor]] = []
    for tokens in (30, 10_000):
        embedder.zero_grad()
        work.backward(batch, Chunks(tokens, 0, seed=1))
        found.append([p.grad.clone() for p in embedder.parameters() if p.grad is not None])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_tokens_of_both_texts_come_from_the_cache(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TERCET_CACHE", str(tmp_path / "cache"))
    data = sources(folder, "scored", "pairs")
    plain = train(recipe(folder), data, tmp_path / "plain", run=QUIET)
    cached = replace(QUIET, cache_tokens=True)
    again = train(recipe(folder), data, tmp_path / "cached", run=cached)
    assert again.fingerprint() == plain.fingerprint()


def test_blended_tasks_of_nv_embed_may_be_scored_pairs(folder: Path, tmp_path: Path):
    toy.save_model(folder / "llama", "llama")
    built = nv_embed(
        model=str(folder / "llama"), stages="blended", steps=2, batch_size=8, pooling="mean"
    )
    mined = [replace(e, negatives=("no answer",)) for e in EXAMPLES]
    write_examples(folder / "mined.jsonl", mined)
    data = {"blended": sources(folder, "scored", "mined")}
    train(built, data, tmp_path / "run", run=QUIET)
    rows = [row for row in read(tmp_path / "run/log.jsonl") if "loss" in row]
    assert all("similarity" in row and math.isfinite(row["loss"]) for row in rows)


def test_a_stage_that_cannot_rank_refuses_scored_pairs(folder: Path, tmp_path: Path):
    built = bge_m3(model=str(folder / "bert"), stages="unified", steps=2)
    with pytest.raises(DataError) as caught:
        train(built, {"examples": sources(folder, "scored")}, tmp_path / "run", run=QUIET)
    assert str(caught.value).endswith(
        "scored.jsonl: 18 of 18 rows are pairs with a similarity score, and the stage unified needs"
        " queries and what answers them; make examples of such pairs with: tercet convert scores"
    )


def test_an_impossible_temperature_is_refused():
    with pytest.raises(RecipeError, match=r"similarity_temperature is 0\.0; give a number above 0"):
        Contrastive(similarity_temperature=0.0)


# ---- scores of a reranker ----------------------------------------------------------------------

JUDGED = [
    replace(
        example,
        negatives=(f"wrong {i}", f"other {i}"),
        positive_scores=(6.0 + i % 3,) if i % 4 else None,
        negative_scores=(float(i % 5), -2.0) if i % 4 else None,
    )
    for i, example in enumerate(EXAMPLES)
]


def slow_lesson(lesson: str, logits: Tensor, batch: Batch, rows: int) -> Tensor:
    """Documents of a row: its positive, then its two negatives."""
    terms = []
    assert batch.teacher is not None
    for row in range(rows):
        own = slice(3 * row, 3 * row + 3)
        teacher, learned = batch.teacher[own].double() / 2, logits[row, own]
        if bool(teacher.isnan().any()):
            continue
        if lesson == "kl":
            terms.append(-(teacher.softmax(0) * learned.log_softmax(0)).sum())
        else:
            gaps = (learned[0] - learned[1:]) - (teacher[0] - teacher[1:])
            terms.append(gaps.square().mean())
    return torch.stack(terms).sum() / rows


@pytest.mark.parametrize("lesson", ["kl", "margin-mse"])
@pytest.mark.parametrize("dims", [(), (4, 9)])
def test_the_scores_of_a_reranker_are_learned_beside_infonce(
    folder: Path, lesson: Any, dims: tuple[int, ...]
):
    """Over each width; a row without scores learns by InfoNCE alone."""
    batch = collator(folder)(JUDGED[:5], [0])
    random = torch.Generator().manual_seed(1)
    dense = torch.randn(len(batch.texts), 16, generator=random, dtype=torch.float64)
    dense.requires_grad_()
    how: dict[str, Any] = {"distil": lesson, "distil_weight": 0.5, "teacher_temperature": 2.0}
    found = Contrastive(temperature=0.1, dims=dims, **how).loss(Vectors(dense), batch)
    contrast, taught = [], []
    for dim in (*dims, 16):
        unit = F.normalize(dense[:, :dim], dim=1)
        contrast.append(info_nce(unit[:5], unit[5:], batch.relation, 0.1))
        taught.append(slow_lesson(lesson, unit[:5] @ unit[5:].T / 0.1, batch, 5))
    torch.testing.assert_close(found["contrast"], torch.stack(contrast).mean())
    torch.testing.assert_close(found["taught"], torch.stack(taught).mean())
    expected = torch.stack(contrast).mean() + 0.5 * torch.stack(taught).mean()
    torch.testing.assert_close(found["loss"], expected)
    (by_found,) = torch.autograd.grad(found["loss"], dense)
    (by_expected,) = torch.autograd.grad(expected, dense)
    torch.testing.assert_close(by_found, by_expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("lesson", ["kl", "listwise", "margin-mse"])
def test_a_run_logs_what_the_reranker_taught(folder: Path, tmp_path: Path, lesson: Any):
    write_examples(folder / "judged.jsonl", JUDGED)
    data = sources(folder, "judged", "scored")
    built = recipe(folder, batch_size=12, distil=lesson, distil_weight=0.1)
    taught = train(built, data, tmp_path / "taught", run=QUIET)
    plain = train(recipe(folder, batch_size=12), data, tmp_path / "plain", run=QUIET)
    assert taught.fingerprint() != plain.fingerprint()
    for row in read(tmp_path / "taught/log.jsonl"):
        if "loss" in row:
            parts = row["contrast"] + 0.1 * row["taught"] + row["similarity"]
            assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_rows_without_scores_are_refused_where_they_are_to_be_learned(folder: Path, tmp_path: Path):
    bare: dict[str, Any] = {"positive_scores": None, "negative_scores": None}
    write_examples(folder / "bare.jsonl", [replace(row, **bare) for row in JUDGED])
    one = Example("q", ("p",), positive_scores=(1.0,))  # has nothing to be compared with
    write_examples(folder / "lone.jsonl", [one] * 4)
    built = recipe(folder, distil="margin-mse")
    data = sources(folder, "bare", "lone")
    with pytest.raises(RecipeError) as caught:
        train(built, data, tmp_path / "taught", run=QUIET)
    assert str(caught.value) == (
        f"the stage {built.stages[0].name} learns a teacher's scores (distil), and no example has "
        f"scores of two documents; write them: tercet score {folder}/bare.jsonl "
        f"{folder}/lone.jsonl --model TEACHER --out scored-rows.jsonl; or set distil to none"
    )
    with pytest.raises(RecipeError, match="no example has scores of two documents"):
        forecast(built, data, run=QUIET)
    write_examples(folder / "judged.jsonl", JUDGED)
    counts = [source.taught for source in sources(folder, "judged", "bare", "lone")]
    assert (counts[0] > 0, counts[1:]) == (True, [0, 0])
    forecast(built, sources(folder, "judged", "bare"), run=QUIET)


def test_scores_are_not_learned_unless_asked_for(folder: Path):
    """Those that mining leaves in the rows are cosines."""
    batch = collator(folder)(JUDGED[:5], [0])
    bare = replace(batch, teacher=None)
    dense = torch.randn(len(batch.texts), 16)
    objective = Contrastive()
    with_scores, without = (objective.loss(Vectors(dense), each) for each in (batch, bare))
    assert torch.equal(with_scores["loss"], without["loss"])


def test_impossible_numbers_of_a_lesson_are_refused():
    with pytest.raises(RecipeError, match=r"teacher_temperature is 0\.0; give a number above 0"):
        Contrastive(teacher_temperature=0.0)
    with pytest.raises(RecipeError, match="every weight must be 0 or more"):
        Contrastive(distil_weight=-1.0)


def test_every_recipe_of_pairs_learns_from_a_reranker():
    stages = [
        finetune(distil="kl").stages[0],
        *nv_embed(distil="margin-mse").stages,
        arctic_embed(finetuning_distil="margin-mse").stages[1],
        bge_m3(unified_distil="margin-mse").stages[2],
    ]
    assert all(stage.objective.traits.needs_scores for stage in stages)
    assert stages[3].refresh is None  # what it would mine has no scores
