"""What each stage of LLM2Vec brings, on real texts.

    python -m benchmarks.llm2vec_quality --run runs/llm2vec

Trains SmolLM2-135M on the train split of the English Debian descriptions (MNTP and SimCSE on their
texts, then pairs of one-line and full description), and measures each stage and the untrained
baselines on packages of the test split and on similarity sets. Small budgets by default; ``--mntp
1000 --simcse 1000`` are the paper's steps. Every stage and every measurement goes on after a kill.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.common import write_results
from tercet.data.sources import open_source, write_examples
from tercet.data.texts import open_texts
from tercet.evaluate.intervals import paired_difference
from tercet.evaluate.retrieval import RetrievalSet, evaluate_retrieval
from tercet.files import replacing_file
from tercet.nn.embedder import Embedder
from tercet.recipes.llm2vec import llm2vec
from tercet.train.loop import train
from tercet.train.run import Run
from tercet.types import Example

DATA = Path(__file__).parent.parent / "examples/data/packages.en.parquet"
PROMPT = "Given one line about a software package, find its full description; "


@dataclass(frozen=True)
class Variant:
    """A model and how it is read."""

    name: str
    model: str  # the base, or a stage's folder inside the run
    options: dict[str, Any]  # of encode
    prompts: bool = False  # whether its own prompts are used


VARIANTS = (
    Variant("causal, mean", "base", {"attention": "causal"}),
    Variant("causal, weighted mean", "base", {"attention": "causal", "pooling": "weighted_mean"}),
    Variant("causal, last", "base", {"attention": "causal", "pooling": "last"}),
    Variant("causal, echo", "base", {"attention": "causal", "echo": True}),
    Variant("both ways, untrained", "base", {"attention": "bidirectional"}),
    Variant("+ MNTP", "1-mntp", {}),
    Variant("+ MNTP + SimCSE", "2-simcse", {}),
    Variant("+ MNTP + SimCSE + supervised", "3-supervised", {}, prompts=True),
)


def main() -> None:
    """Train what is not trained yet, measure what is not measured yet, write the results."""
    parser = argparse.ArgumentParser(
        description="What each stage of LLM2Vec brings, on real texts."
    )
    parser.add_argument("--run", type=Path, default=Path("runs/llm2vec"))
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--mntp", type=int, default=100, help="steps of 8 blocks of 256 tokens")
    parser.add_argument("--simcse", type=int, default=60, help="steps of 64 sentences")
    parser.add_argument("--supervised", type=int, default=40, help="steps of 32 pairs")
    parser.add_argument("--packages", type=int, default=1_000, help="of the test split")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--only", choices=("train", "baselines", "measure"), help="a part of it")
    chosen = parser.parse_args()
    packages = pq.read_table(DATA).to_pylist()
    if chosen.only in (None, "train"):
        _train(chosen, packages)
    if chosen.only in (None, "baselines", "measure"):
        _measure(chosen, [p for p in packages if p["split"] == "test"][: chosen.packages])


def _train(chosen: argparse.Namespace, packages: list[dict[str, Any]]) -> None:
    folder = chosen.run / "data"
    known = [p for p in packages if p["split"] == "train"]
    if not (folder / "pairs.jsonl").exists():
        _write_lines(folder / "texts.jsonl", (p["long"] for p in known))
        _write_lines(folder / "sentences.jsonl", sentences_of(known))
        write_examples(
            folder / "pairs.jsonl",
            (Example(p["short"], (p["long"],), task="debian") for p in known),
        )
    recipe = llm2vec(
        base=chosen.base,
        stages="mntp,simcse,supervised",
        mntp_steps=chosen.mntp,
        mntp_batch_size=8,
        block_tokens=256,
        mntp_learning_rate=3e-4,
        simcse_steps=chosen.simcse,
        simcse_batch_size=64,
        simcse_learning_rate=1e-4,
        simcse_tokens=64,
        supervised_steps=chosen.supervised,
        batch_size=32,
        learning_rate=2e-4,
        temperature=0.05,
        max_tokens=128,
        query_prompt=PROMPT,
    )
    data = {
        "texts": [open_texts(folder / "texts.jsonl")],
        "sentences": [open_texts(folder / "sentences.jsonl")],
        "pairs": [open_source(folder / "pairs.jsonl")],
    }
    run = Run(precision=chosen.precision, save_minutes=3, show_progress=False)
    train(recipe, data, chosen.run, run=run, say=lambda line: print(line, flush=True))


def sentences_of(packages: list[dict[str, Any]]) -> Iterator[str]:
    """One-line descriptions, and sentences of 5 to 40 words of the full ones."""
    for package in packages:
        yield package["short"]
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", package["long"]):
            if 5 <= len(sentence.split()) <= 40:
                yield sentence


def _write_lines(path: Path, texts: Iterator[str]) -> None:
    with replacing_file(path) as fresh, fresh.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _measure(chosen: argparse.Namespace, packages: list[dict[str, Any]]) -> None:
    data = RetrievalSet.from_examples(
        [Example(p["short"], (p["long"],)) for p in packages], name="debian test"
    )
    found: dict[str, np.ndarray] = {}
    rows = []
    for variant in VARIANTS:
        if chosen.only == "baselines" and variant.model != "base":
            continue
        scores, seconds = _scores(chosen, variant, data)
        if scores is None:
            print(f"{variant.name}: not trained yet")
            continue
        found[variant.name] = scores.scores["ndcg@10"]
        first = next(iter(found.values()))
        gain = paired_difference(found[variant.name], first)
        rows.append(
            {
                "name": variant.name,
                "ndcg@10": str(scores.interval("ndcg@10")),
                "minus the first": f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
                "recall@100": scores.mean("recall@100"),
                "encode cpu s": round(seconds, 1),
            }
        )
    if chosen.only is None or chosen.only == "measure":
        write_results("llm2vec_quality", rows)
    for row in rows:
        print(row)


def _scores(chosen: argparse.Namespace, variant: Variant, data: RetrievalSet) -> Any:
    """The variant's result and the CPU seconds of encoding; vectors are kept in the run folder."""
    place = chosen.run / variant.model / "model"
    kept = chosen.run / "vectors" / f"{re.sub(r'[^a-z0-9]+', '-', variant.name.lower())}.npz"
    if not kept.exists():
        if variant.model != "base" and not place.is_dir():
            return None, 0.0
        changes: dict[str, Any] = {"query_tokens": 128, "document_tokens": 128}
        if not variant.prompts:
            changes["prompts"] = {}
        embedder = Embedder.load(
            chosen.base if variant.model == "base" else place,
            dtype=getattr(torch, chosen.precision),
            **changes,
        )
        began = time.process_time()
        queries = embedder.encode(data.queries, "query", **variant.options)
        documents = embedder.encode(data.documents, "document", **variant.options)
        seconds = time.process_time() - began
        with replacing_file(kept) as fresh, fresh.open("wb") as file:
            np.savez(file, queries=queries, documents=documents, seconds=seconds)
    held = np.load(kept)
    names = ("ndcg@10", "recall@100")
    result = evaluate_retrieval(data, held["queries"], held["documents"], names=names)
    return result, float(held["seconds"])


if __name__ == "__main__":
    main()
