"""What does a unified fine-tuning step of BGE-M3 cost, against FlagEmbedding 1.4.2.

One step of all three kinds of vectors with self-distillation, in-batch negatives, float32: texts
to tokens, forward, backward, clipping, AdamW. Both sides are processes of their own with one
thread, driven by the same commands in turn, from the same weights, on the same rows: the one-line
description of a Debian package, its full description, and those of other packages, in their natural
lengths. The padding factor (token slots of the peer, over tokens) stands beside each ratio; a
control row has queries of one length and documents of one length, where both have one loss.

- ``error`` is the difference of the first losses over the peer's. Where texts differ in length it
  is not rounding: the peer lets rows of padding win in late interaction.
- Memory is what the process needs at its peak, above what it holds before the first step; the
  state of AdamW is in it.
- The vocabulary of 250,002 is XLM-R's size; texts are made of its first 8,000 pieces, which changes
  nothing in what either side computes.

The peer needs an environment of its own: ``benchmarks/m3_peer.py`` says how to make it.

    python -m benchmarks.m3_step --peer peer/bin/python
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers.utils import logging

from benchmarks.common import Row, write_results
from benchmarks.sides import Answer, Side, memory, serve, spent
from tercet.data.batches.collate import Collator
from tercet.kinds import KINDS
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.objectives.unified import Unified
from tercet.types import Example

DATA = Path(__file__).parents[1] / "examples/data/packages.en.parquet"
TITLE = "What does a unified fine-tuning step of BGE-M3 cost, against FlagEmbedding 1.4.2."
Packages = list[dict[str, str]]
REPEATS = 5
EQUAL = (8, 48)  # tokens of queries and documents of the control row


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    name: str
    model: str  # of those that are made
    target: float | None = None  # times fewer CPU seconds than the peer
    queries: int = 8  # of a step
    group: int = 8  # documents that come with a query
    tokens: int = 512  # longer texts are cut, as in the published script
    equal: bool = False  # texts of one length


# What the peer has memory for on a machine of 24 GB, with a vocabulary of that size.
FEW: Any = {"queries": 4, "group": 4, "tokens": 256}
CASES = (
    Case(name="control: texts of one length", model="8,000", equal=True),
    Case(name="vocabulary 8,000, 8 queries", model="8,000", target=8),
    Case(name="vocabulary 8,000, 16 queries", model="8,000", target=8, queries=16),
    Case(name="vocabulary 250,002", model="250,002", target=20, **FEW),
    Case(name="me5-small", model="me5-small", **FEW),
)


# ---- our side: the same commands as the peer's ---------------------------------------------------


def start(folder: str, rows: str, queries: int, tokens: int) -> tuple[Callable[[], Answer], Answer]:
    """A step as the training loop takes it."""
    embedder = Embedder.load(folder, query_tokens=tokens, document_tokens=tokens)
    collate = Collator(tokenize=embedder.tokenize, prompt_of=lambda role, task: "", negatives=64)
    work = Unified().start(embedder, [], collate)
    weights = [weight for weight in embedder.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0, fused=True)
    embedder.train()
    endless = cycle(json.loads(Path(rows).read_text(encoding="utf-8")))

    def once() -> Answer:
        chosen = [next(endless) for _ in range(queries)]
        examples = [Example(query, (first,), tuple(rest)) for query, (first, *rest) in chosen]
        batch = work.collate(examples, [0])
        losses = work.backward(batch, Chunks(max_tokens=2_048))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return {"loss": float(losses["loss"]), "tokens": len(batch.texts.ids)}

    trained = sum(weight.numel() for weight in weights)
    return lambda: spent(once), {"trained": trained, "base": memory("VmRSS")}


def worker() -> None:
    """Read commands, answer them, until the input ends."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    step: list[Callable[[], Answer]] = []

    def answer(do: str, **numbers: Any) -> Answer:
        if do == "step_start":
            once, told = start(**numbers)
            step[:] = [once]
            return told
        return step[0]()

    serve(answer)


# ---- both sides in turn --------------------------------------------------------------------------


def compared(case: Case, peer: str, folder: str, rows: str, repeats: int) -> Row:
    """One row: both sides start, warm up once, and then take turns."""
    sides = {
        "ours": Side(sys.executable, "-m", "benchmarks.m3_step", "--worker"),
        "peer": Side(peer, "-m", "benchmarks.m3_peer"),
    }
    numbers = {name: asdict(case)[name] for name in ("queries", "tokens")}
    base = {
        side: answer("step_start", folder=folder, rows=rows, **numbers)["base"]
        for side, answer in sides.items()
    }
    found: dict[str, list[Answer]] = {side: [] for side in sides}
    for _ in range(1 + repeats):
        for side, answer in sides.items():
            found[side].append(answer("step"))
    for answer in sides.values():
        answer.end()
    seconds = {side: median(a["seconds"] for a in found[side][1:]) for side in sides}
    grown = {side: max(a["peak"] for a in found[side]) - base[side] for side in sides}
    first = {side: found[side][0]["loss"] for side in sides}
    slots, tokens = (sum(a[what] for a in found["peer"]) for what in ("slots", "tokens"))
    assert tokens == sum(a["tokens"] for a in found["ours"]), "both sides read the same tokens"
    return {
        "name": case.name,
        "ours": seconds["ours"],
        "peer": seconds["peer"],
        "unit": "CPU seconds a step",
        "ratio": seconds["peer"] / seconds["ours"],
        "target": case.target,
        "error": abs(first["ours"] - first["peer"]) / first["peer"],
        "loss": [first["ours"], first["peer"]],
        "padding_factor": slots / tokens,
        "tokens a step": round(tokens / (1 + repeats)),
        "texts": [case.queries, case.queries * case.group],
        "memory GB": [grown[side] / 1e9 for side in sides],
        "memory share": grown["ours"] / grown["peer"],
    }


def rows_of(packages: Packages, case: Case, embedder: Embedder) -> list[object]:
    """Queries with their documents, which are of as many packages: no text is there twice."""
    order = np.random.default_rng(0).permutation(len(packages))
    texts = [[packages[i][kind] for i in order] for kind in ("short", "long")]
    count = 4 * case.queries
    if case.equal:
        texts = [
            list(islice(_of_length(embedder, side, tokens), count * case.group))
            for side, tokens in zip(texts, EQUAL, strict=True)
        ]
    shorts, longs = texts
    starts = [row * case.group for row in range(count)]
    return [[shorts[start], longs[start : start + case.group]] for start in starts]


def _of_length(embedder: Embedder, texts: list[str], tokens: int) -> Iterator[str]:
    """Starts of texts that have exactly so many tokens, each once."""
    seen: set[str] = set()
    for text in texts:
        words = text.split()
        starts = [" ".join(words[:count]) for count in range(1, min(len(words), tokens) + 1)]
        lengths = embedder.tokenizer(starts, 10_000).lengths if starts else []
        chosen = next((s for s, n in zip(starts, lengths, strict=True) if n == tokens), None)
        if chosen is not None and chosen not in seen:
            seen.add(chosen)
            yield chosen


def make_models(peer: str, scratch: Path, texts: Path, names: set[str]) -> dict[str, str]:
    """A folder for each model that is asked for."""
    maker, folders = Side(peer, "-m", "benchmarks.m3_peer"), {}
    for name in sorted(names):
        folder = scratch / name.replace(",", "")
        if name == "me5-small":
            Embedder.load(name, kinds=KINDS, pooling="first").save(folder)
            _without_dropout(folder / "config.json")
        else:
            vocabulary = int(name.replace(",", ""))
            maker("make", folder=str(folder), texts=str(texts), vocabulary=vocabulary)
        folders[name] = str(folder)
    maker.end()
    return folders


def _without_dropout(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(
        json.dumps(config | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    )


def main() -> None:
    """Compare, print and write the rows."""
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--peer", help="the Python of the peer's environment")
    parser.add_argument("--worker", action="store_true", help="be our side")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--only", type=int, help="one row, counted from 0; nothing is written")
    chosen = parser.parse_args()
    if chosen.worker:
        worker()
        return
    if not chosen.peer:
        parser.error("--peer is needed: the Python of an environment with FlagEmbedding 1.4.2")
    logging.disable_progress_bar()
    cases = CASES if chosen.only is None else CASES[chosen.only : chosen.only + 1]
    every = [p for p in pq.read_table(DATA).to_pylist() if p["split"] == "train"]
    packages = list({p["long"]: p for p in {p["short"]: p for p in every}.values()}.values())
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        texts = place / "texts.json"
        texts.write_text(json.dumps([p["long"] for p in packages[:5_000]]), encoding="utf-8")
        folders = make_models(chosen.peer, place, texts, {case.model for case in cases})
        rows = []
        for case in cases:
            embedder = Embedder.load(folders[case.model])
            file = place / "rows.json"
            file.write_text(json.dumps(rows_of(packages, case, embedder)), encoding="utf-8")
            folder = folders[case.model]
            rows.append(compared(case, chosen.peer, folder, str(file), chosen.repeats))
    if chosen.only is None:
        write_results("m3_step", rows)
    else:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
