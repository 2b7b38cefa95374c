"""NV-Embed (arXiv 2405.17428), tests 8 to 11: who is a negative, and how stages are trained.

Run as a script, this file is one of the two processes of test 10.
"""

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tercet import distributed
from tercet.data.batches.relation import Relation, relation_of
from tercet.data.batches.sampler import BatchPlan, Sampler
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.losses.info_nce import info_nce
from tercet.recipes.nv_embed import nv_embed
from tercet.training import loop, trainer
from tercet.training.loop import train
from tercet.training.recipe import Recipe, Run
from tercet.types import Example, InBatch
from tests import toy
from tests.processes import run_together

QUIET = Run(device="cpu", show_progress=False)
TEMPERATURE = 0.1
POSITIVES = [["p0"], ["p1"], ["p2"]]
NEGATIVES = [["n0", "m0"], ["n1"], []]  # ragged
QUERIES = ["a", "b", "c"]
COLUMNS = [0, 0, 0, 1, 1, 2]  # whose document each column is: p0 n0 m0, p1 n1, p2
MINED = [False, True, True, False, True, False]


@dataclass(frozen=True)
class OneRow:
    """A relation of which one query counts."""

    whole: Relation
    row: int
    positives: int = 1

    def rows(self, start: int, stop: int, device: torch.device | None = None) -> Tensor:
        assert (start, stop) == (0, 1)
        return self.whole.rows(self.row, self.row + 1, device)

    def positive_pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        assert (start, stop) == (0, 1)
        return self.whole.positive_pairs(self.row, self.row + 1)

    def false_negatives(self, start: int, stop: int, logits: Tensor, temperature: float) -> None:
        """Every negative counts."""


def vectors(count: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 5, dtype=torch.float64), dim=1)


def row_loss(row: int, docs: Tensor, in_batch: InBatch) -> float:
    relation = relation_of(QUERIES, POSITIVES, NEGATIVES, in_batch=in_batch)
    queries = vectors(3, 0)
    return float(info_nce(queries[row : row + 1], docs, OneRow(relation, row), TEMPERATURE))


def by_hand(row: int, docs: Tensor, candidates: list[int]) -> float:
    """-log of the share of the row's positive among these columns."""
    scores = (docs @ vectors(3, 0)[row] / TEMPERATURE).exp()
    positive = [0, 3, 5][row]
    return float(-torch.log(scores[positive] / scores[[positive, *candidates]].sum()))


# ---- 8: candidates ---------------------------------------------------------------------------


def test_08_in_the_second_stage_another_rows_documents_do_not_change_a_rows_loss():
    docs = vectors(6, 1)
    for row in range(3):
        other = docs.clone()
        strangers = [column for column, owner in enumerate(COLUMNS) if owner != row]
        other[strangers] = vectors(len(strangers), 2)
        assert row_loss(row, other, "none") == row_loss(row, docs, "none")
        assert abs(row_loss(row, other, "all") - row_loss(row, docs, "all")) > 1e-3


def test_08_the_recipes_second_stage_takes_own_negatives_and_the_first_all():
    first, second = nv_embed().stages
    assert (first.in_batch, second.in_batch) == ("all", "none")


@pytest.mark.parametrize(
    ("in_batch", "candidates"),
    [
        ("none", [[1, 2], [4], []]),
        ("positives", [[1, 2, 3, 5], [4, 0, 5], [0, 3]]),
        ("all", [[1, 2, 3, 4, 5], [4, 0, 1, 2, 5], [0, 1, 2, 3, 4]]),
    ],
)
def test_08_each_mode_has_the_candidates_written_by_hand(
    in_batch: InBatch, candidates: list[list[int]]
):
    docs = vectors(6, 1)
    for row in range(3):
        assert row_loss(row, docs, in_batch) == pytest.approx(by_hand(row, docs, candidates[row]))


def test_08_rows_of_one_batch_may_differ_in_what_they_take():
    relation = relation_of(QUERIES, POSITIVES, NEGATIVES, in_batch=["all", "none", "positives"])
    assert relation.rows(0, 3).tolist() == [
        [1, -1, -1, -1, -1, -1],
        [0, 0, 0, 1, -1, 0],
        [-1, 0, 0, -1, 0, 1],
    ]


# ---- 9: equal and missing documents ----------------------------------------------------------


def test_09_a_document_that_is_there_twice_is_masked():
    docs = vectors(3, 1)
    docs[2] = docs[0]  # the same text has the same vector
    relation = relation_of(["a", "b"], [["same"], ["y"]], [[], ["same"]])
    queries = vectors(2, 0)
    one = info_nce(queries[:1], docs, OneRow(relation, 0), TEMPERATURE)
    scores = (docs[:2] @ queries[0] / TEMPERATURE).exp()  # without the second copy
    assert float(one) == pytest.approx(float(-torch.log(scores[0] / scores.sum())))
    blind = relation_of(["a", "b"], [["same"], ["y"]], [[], ["same"]], mask_duplicates=False)
    assert float(info_nce(queries[:1], docs, OneRow(blind, 0), TEMPERATURE)) > float(one) + 0.1


def test_09_ragged_negatives_equal_padded_ones_with_scores_of_minus_infinity():
    docs, queries = vectors(6, 1), vectors(3, 0)
    relation = relation_of(QUERIES, POSITIVES, NEGATIVES, in_batch="none")
    found = info_nce(queries, docs, relation, TEMPERATURE)
    padded = torch.full((3, 3), -torch.inf, dtype=torch.float64)
    for row, columns in enumerate([[0, 1, 2], [3, 4], [5]]):
        padded[row, : len(columns)] = docs[columns] @ queries[row] / TEMPERATURE
    expected = torch.nn.functional.cross_entropy(padded, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found, expected)


# ---- 10: two processes -----------------------------------------------------------------------


def prepare(folder: Path) -> None:
    """A model without dropout, pairs, and labelled texts whose labels repeat."""
    config = toy.save_model(folder / "base", "llama") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.0}))
    text = toy.SENTENCES
    pairs = [
        Example(
            f"{t.split()[-1]} {i}",
            (t,),
            (text[(i + 3) % 12],),
            query_prompt="Instruct: find it\nQuery: ",
            task="pairs",
        )
        for i, t in enumerate(text)
    ]
    labels = [
        Example(t, ("odd" if i % 2 else "even",), ("even" if i % 2 else "odd",), in_batch="none")
        for i, t in enumerate(text)
    ]
    write_examples(folder / "pairs.jsonl", pairs)
    write_examples(folder / "labels.jsonl", labels)


def recipe(folder: Path, **changes: Any) -> Recipe:
    numbers: dict[str, Any] = {
        "retrieval_steps": 2,
        "blended_steps": 2,
        "batch_size": 7,
        "retrieval_learning_rate": 1e-30,  # weights stay, so that both runs have the same ones
        "blended_learning_rate": 1e-30,
        "latents": 6,
        "heads": 2,
        "init": "normal",
        "lora_dropout": 0.0,
    }
    return nv_embed(model=str(folder / "base"), **(numbers | changes))


def sources(folder: Path) -> dict[str, list[Source]]:
    pairs, labels = (open_source(folder / f"{name}.jsonl") for name in ("pairs", "labels"))
    return {"retrieval": [pairs], "blended": [pairs, labels]}


def steps_of(folder: Path, out: str, pooling: str) -> list[dict[str, Any]]:
    """The summed gradient and the loss of every step of both stages, in float64."""
    found: list[dict[str, Any]] = []
    add, build, total = distributed.sum_gradients, loop.build, trainer.everyones

    def recorded(parameters: list[torch.nn.Parameter]) -> None:
        add(parameters)
        found.append({"gradient": [p.grad.clone() for p in parameters if p.grad is not None]})

    def everyones(*shares: Any) -> Any:
        read = total(*shares)
        found[-1]["loss"] = read[0]["loss"]
        return read

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "sum_gradients", recorded)
        patch.setattr(trainer, "everyones", everyones)
        patch.setattr(loop, "build", lambda model: build(model).to(torch.float64))
        policy = "none" if pooling == "latent" else "per_row"
        given = recipe(folder, pooling=pooling, blended_in_batch=policy)
        train(given, sources(folder), folder / out, run=QUIET)
    return found


POOLINGS = ("latent", "self_attention")


def one_of_two(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    found = {pooling: steps_of(folder, f"two {pooling}", pooling) for pooling in POOLINGS}
    torch.save(found, folder / f"{distributed.rank()}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    prepare(folder)
    run_together(__file__, str(folder))
    return folder


@pytest.mark.parametrize("pooling", POOLINGS)
def test_10_two_processes_equal_one_in_both_stages(folder: Path, pooling: str):
    alone = steps_of(folder, f"one {pooling}", pooling)
    assert len(alone) == 4
    assert all(step["gradient"] for step in alone)
    for rank in range(2):
        both = torch.load(folder / f"{rank}.pt", weights_only=False)[pooling]
        for found, expected in zip(both, alone, strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
            one, other = (
                torch.cat([x.flatten() for x in side["gradient"]]) for side in (found, expected)
            )
            assert float((one - other).norm() / other.norm()) < 1e-12


# ---- 11: blended batches ---------------------------------------------------------------------


def of(tmp_path: Path, name: str, rows: int, weight: float) -> Source:
    path = tmp_path / f"{name}.jsonl"
    write_examples(path, [Example(f"{name} {i}", (f"answer {i}",)) for i in range(rows)])
    return open_source(path, weight=weight)


def blended(tmp_path: Path) -> Sampler:
    sources = [of(tmp_path, "a", 300, 1.0), of(tmp_path, "b", 100, 2.0), of(tmp_path, "c", 100, 1)]
    return Sampler(sources, BatchPlan(batch_size=24, seed=5, epochs=4, mixing="blended"))


def test_11_every_batch_holds_every_task_in_the_promised_share(tmp_path):
    sampler = blended(tmp_path)
    drawn: Counter[int] = Counter()
    batches = 0
    while (batch := sampler.next_batch()) is not None:
        share = np.bincount(batch.source, minlength=3) / len(batch)
        # 300, 2 x 100 and 100 rows: 12, 8 and 4 of 24, one more or less in a single batch.
        assert np.abs(share * len(batch) - np.array([12, 8, 4]) * len(batch) / 24).max() <= 1
        drawn.update(batch.source.tolist())
        batches += 1
    assert batches == 100
    assert [drawn[i] for i in range(3)] == [1200, 800, 400]


def test_11_a_resumed_run_draws_the_same_batches(tmp_path):
    first, second = blended(tmp_path), blended(tmp_path)
    for _ in range(30):
        first.next_batch()
    second.restore(first.state())
    for _ in range(30):
        one, other = first.next_batch(), second.next_batch()
        assert one is not None and other is not None
        assert one.source.tolist() == other.source.tolist()
        assert one.row.tolist() == other.row.tolist()


def test_11_one_source_a_batch_is_there_too(tmp_path):
    sources = [of(tmp_path, "a", 50, 1.0), of(tmp_path, "b", 30, 1.0)]
    sampler = Sampler(sources, BatchPlan(batch_size=8, seed=5, epochs=1, mixing="single"))
    seen = set()
    while (batch := sampler.next_batch()) is not None:
        assert len(set(batch.source.tolist())) == 1
        seen.add(int(batch.source[0]))
    assert seen == {0, 1}


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
