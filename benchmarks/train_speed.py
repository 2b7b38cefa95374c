"""What does a contrastive training step cost, against sentence-transformers.

Forward and backward of MiniLM on Debian package descriptions, pairs in random order, no dropout,
one thread, tokens made beforehand on both sides; float32, or bfloat16 by autocast. The peer has
MultipleNegativesRankingLoss, or CachedMultipleNegativesRankingLoss with the best of several
mini-batch sizes. What packing saves is padding, so the padding factor (token slots of the peer,
over tokens) stands beside every ratio, and a control row has texts of one length.

Run: python -m benchmarks.train_speed
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from torch import Tensor
from transformers.utils import logging

from benchmarks.common import Row, extra_memory, interleaved, write_results
from tercet.data.batches.collate import Batch
from tercet.data.batches.relation import relation_of
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks, backward_in_chunks
from tercet.models.tokens import Tokens
from tercet.models.zoo import zoo
from tercet.objectives.contrastive import Contrastive
from tercet.vectors import Vectors

DATA = Path(__file__).parents[1] / "examples/data/packages.en.parquet"
TEMPERATURE = 0.05
LIMIT = 256  # tokens of a text; the model's own
SEED = 0
NEARLY_NO_DROPOUT = 1e-7
Pairs = list[tuple[str, str]]
Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class Case:
    """Pairs of token ids, and how to train on them."""

    name: str
    queries: list[np.ndarray]
    documents: list[np.ndarray]
    target: str
    kept_shares: tuple[float, ...] = ()  # of our graphs; with these the peer's loss is cached
    half: bool = False  # in bfloat16, by autocast
    peer_half: bool = False

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(map(len, [*self.queries, *self.documents]))

    @property
    def padding_factor(self) -> float:
        """Token slots when each column is padded to its longest text, over tokens."""
        slots = sum(len(side) * max(map(len, side)) for side in (self.queries, self.documents))
        return slots / self.tokens


def cases() -> list[Case]:
    """The batches that are measured; drawn once, by the seed."""
    table = pq.read_table(DATA, columns=["short", "long", "split"]).to_pylist()
    train = [(row["short"], row["long"]) for row in table if row["split"] == "train"]
    order = np.random.default_rng(SEED).permutation(len(train))
    pairs = [train[i] for i in order]
    both = [pair if i % 2 else pair[::-1] for i, pair in enumerate(pairs)]
    draw = np.random.default_rng(SEED)
    equal = [draw.integers(1_000, 30_000, 64).astype(np.int32) for _ in range(128)]
    usual = _case("64 pairs, short -> long", pairs[:64], "ratio >= 5")
    half = replace(usual, half=True, target="")
    return [
        usual,
        replace(half, name=f"{usual.name}, bfloat16", peer_half=True),
        replace(half, name=f"{usual.name}, bfloat16 / float32"),
        _case("64 pairs, both directions mixed", both[:64], "ratio >= 5"),
        Case("control: 64 pairs, all of 64 tokens", equal[:64], equal[64:], "about 1"),
        _case("256 pairs, in chunks", pairs[:256], "ratio >= 4", kept_shares=(1.0, 0.5, 0.0)),
    ]


def _case(name: str, pairs: Pairs, target: str, kept_shares: tuple[float, ...] = ()) -> Case:
    tokenizer = embedder().tokenizer
    queries, documents = (tokenizer([pair[i] for pair in pairs], LIMIT).ids for i in (0, 1))
    return Case(name, queries, documents, target, kept_shares)


def embedder() -> Embedder:
    """MiniLM, packed, without dropout."""
    return without_dropout(Embedder.load("minilm"))


def without_dropout(model: Model, of_attention: float = 0.0) -> Model:
    """Return a model in training mode that drops nothing, but for some attention weights."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = of_attention if name.endswith("attention.self.dropout") else 0.0
    return model.train()


def our_step(case: Case, kept: float = 1.0) -> Callable[[], float]:
    """Loss and gradients by packed chunks; the graphs of this share of the tokens are kept."""
    model, size = embedder(), len(case.queries)
    ids = [*case.queries, *case.documents]
    texts = Tokens(ids, [0] * len(ids), 0).pack()
    names = [str(i) for i in range(size)]
    relation = relation_of([f"query {i}" for i in names], [[i] for i in names], [[]] * size)
    batch = Batch(texts, size, relation, 0)
    objective = Contrastive(temperature=TEMPERATURE)
    chunks = Chunks(2_048, round(kept * case.tokens))

    def step() -> float:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.half):
            found = backward_in_chunks(
                model, texts, lambda v: objective.loss(Vectors(v), batch), chunks=chunks
            )
        step.gradient = _gradient(model)  # pyright: ignore[reportFunctionMemberAccess]
        return float(found["loss"])

    return step


def peer_step(case: Case, mini_batch: int | None = None) -> Callable[[], float]:
    """Loss and gradients by sentence-transformers, padded as its collator pads."""
    model = SentenceTransformer(str(zoo.resolve("minilm")), device="cpu")
    # With dropout torch avoids a kernel whose backward pass is slow in bfloat16.
    without_dropout(model, NEARLY_NO_DROPOUT if case.peer_half else 0.0)
    scale = 1 / TEMPERATURE
    if mini_batch is None:
        loss: Any = losses.MultipleNegativesRankingLoss(model, scale=scale)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(
            model, scale=scale, mini_batch_size=mini_batch
        )
    features = [_padded(case.queries), _padded(case.documents)]

    def step() -> float:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.peer_half):
            value = loss([dict(column) for column in features], None)
        value.backward()
        step.gradient = _gradient(model)  # pyright: ignore[reportFunctionMemberAccess]
        return float(value.detach())

    return step


def _gradient(model: torch.nn.Module) -> Tensor:
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()


def _padded(rows: Sequence[np.ndarray]) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row.astype(np.int64)), 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def peak_flops() -> float:
    """The speed of a plain matrix product in this run, in FLOP a CPU second."""
    x, w = torch.randn(1024, 384), torch.randn(1536, 384)
    spent = interleaved({"gemm": lambda: [F.linear(x, w) for _ in range(50)]}, 5)["gemm"]
    return 50 * 2 * x.numel() * len(w) / min(spent)


def measure(case: Case, repeats: int) -> list[Row]:
    """Best of interleaved repeats, both sides' loss and gradient norm, and their peak memory."""
    size = best_mini_batch(case) if case.kept_shares else None
    names = {share: f", {share:.0%} of the graphs kept" for share in case.kept_shares} or {1.0: ""}
    ours = {share: our_step(case, share) for share in names}
    peer = peer_step(case, size)
    spent = interleaved(
        {**{str(share): step for share, step in ours.items()}, "peer": peer}, repeats
    )
    expected, norm = peer(), peer.gradient  # pyright: ignore[reportFunctionMemberAccess]
    peer_memory = extra_memory(partial(peer_step, case, size)) / 1e9
    rate = {name: case.tokens / min(seconds) for name, seconds in spent.items()}
    useful = 3 * 2 * 10.6e6  # FLOP a token of the linear layers, forward and backward
    peak = peak_flops()
    rows = []
    for share, name in names.items():
        found = ours[share]()
        gradient = ours[share].gradient  # pyright: ignore[reportFunctionMemberAccess]
        seconds = spent[str(share)]
        rows.append(
            {
                "name": case.name + name,
                "ours": round(rate[str(share)], 1),
                "peer": round(rate["peer"], 1),
                "unit": "tokens per CPU second",
                "ratio": rate[str(share)] / rate["peer"],
                "target": case.target,
                "error": abs(found - expected),
                "gradient error": abs(float(gradient / norm) - 1),
                "padding_factor": case.padding_factor,
                "memory ours GB": extra_memory(partial(our_step, case, share)) / 1e9,
                "memory peer GB": peer_memory,
                "of peak": useful * rate[str(share)] / peak,
                "peer mini batch": size,
                "spread": max(seconds) / min(seconds),
                "repeats": repeats,
            }
        )
    return rows


def best_mini_batch(case: Case) -> int:
    """The mini-batch size at which the peer is fastest on a quarter of the batch."""
    quarter = len(case.queries) // 4
    part = replace(case, queries=case.queries[:quarter], documents=case.documents[:quarter])
    sides = {str(size): peer_step(part, size) for size in (16, 32, 64)}
    spent = {name: min(seconds) for name, seconds in interleaved(sides, 1).items()}
    return int(min(spent, key=spent.__getitem__))


def main() -> None:
    """Measure, print, write."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    write_results("train_speed", [row for case in cases() for row in measure(case, repeats)])


if __name__ == "__main__":
    main()
