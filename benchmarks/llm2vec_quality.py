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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.common import Row, write_results
from examples.similarity_sets import debtags_similarity, lee_similarity
from tercet.data.files.sources import open_source, write_examples
from tercet.data.files.texts import open_texts
from tercet.evaluate.measures.retrieval import evaluate_retrieval
from tercet.evaluate.measures.sts import evaluate_similarity
from tercet.evaluate.report.intervals import paired_difference
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.atomic import replacing_file
from tercet.models.embedder import Embedder
from tercet.recipes.llm2vec import llm2vec
from tercet.training.loop import train
from tercet.training.recipe import Run
from tercet.types import Example, Role

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
        model=chosen.base,
        stages="mntp,simcse,supervised",
        mntp_steps=chosen.mntp,
        mntp_batch_size=8,
        mntp_block_tokens=256,
        mntp_learning_rate=3e-4,
        simcse_steps=chosen.simcse,
        simcse_batch_size=64,
        simcse_learning_rate=1e-4,
        simcse_max_tokens=64,
        supervised_steps=chosen.supervised,
        supervised_batch_size=32,
        supervised_learning_rate=2e-4,
        supervised_temperature=0.05,
        max_tokens=128,
        query_prompt=PROMPT,
    )
    data = {
        "texts": [open_texts(folder / "texts.jsonl")],
        "sentences": [open_texts(folder / "sentences.jsonl")],
        "pairs": [open_source(folder / "pairs.jsonl")],
    }
    run = Run(dtype=chosen.precision, save_minutes=3, show_progress=False)
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
    sets = {"debtags": debtags_similarity(DATA), "lee": lee_similarity()}
    parts: dict[str, tuple[tuple[str, ...], Role]] = {
        "queries": (data.queries, "query"),
        "documents": (data.documents, "document"),
        **{name: (pairs.texts, "document") for name, pairs in sets.items()},  # no instruction
    }
    rows: list[Row] = []
    first: dict[str, Any] = {}
    for variant in VARIANTS:
        if chosen.only == "baselines" and variant.model != "base":
            continue
        if variant.model != "base" and not (chosen.run / variant.model / "model").is_dir():
            print(f"{variant.name}: not trained yet")
            continue
        held = _vectors(chosen, variant, parts)
        found = evaluate_retrieval(
            data, held["queries"], held["documents"], names=("ndcg@10", "recall@100")
        )
        first = first or {"ndcg@10": found.scores["ndcg@10"]}
        gain = paired_difference(found.scores["ndcg@10"], first["ndcg@10"])
        row: Row = {
            "name": variant.name,
            "ndcg@10": str(found.interval("ndcg@10")),
            "minus the first": f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
            "recall@100": round(found.mean("recall@100"), 3),
        }
        for name, pairs in sets.items():
            result = evaluate_similarity(pairs, held[name])
            first.setdefault(name, result)
            row[f"spearman {name}"] = str(result.interval())
            gain = result.minus(first[name])
            row[f"{name} minus the first"] = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        rows.append({**row, **_budget(chosen, variant)})
    if chosen.only == "baselines":
        for row in rows:
            print(row)
    else:
        write_results("llm2vec_quality", rows)


def _budget(chosen: argparse.Namespace, variant: Variant) -> Row:
    """Steps, tokens and minutes of the stage that a variant adds."""
    if variant.model == "base":
        return {}
    saved = json.loads((chosen.run / variant.model / "model/tercet.json").read_text())["about"]
    stage = saved["stages"][-1]
    return {
        "steps": stage["steps"],
        "tokens": stage["tokens"],
        "minutes": round(stage["seconds"] / 60, 1),
        "seed": saved["seed"],
    }


def _vectors(
    chosen: argparse.Namespace, variant: Variant, parts: dict[str, tuple[tuple[str, ...], Role]]
) -> dict[str, np.ndarray]:
    """The variant's vectors of each part; those of an earlier call are kept in the run folder."""
    stem = re.sub(r"[^a-z0-9]+", "-", variant.name.lower()).strip("-")
    embedder: Embedder | None = None
    found: dict[str, np.ndarray] = {}
    for name, (texts, role) in parts.items():
        kept = chosen.run / "vectors" / f"{stem}.{name}.npy"
        if not kept.exists():
            embedder = embedder or _load(chosen, variant)
            vectors = embedder.encode(texts, role, **variant.options)
            with replacing_file(kept) as fresh, fresh.open("wb") as file:
                np.save(file, vectors)
        found[name] = np.load(kept)
    return found


def _load(chosen: argparse.Namespace, variant: Variant) -> Embedder:
    changes: dict[str, Any] = {"query_tokens": 128, "document_tokens": 128}
    if not variant.prompts:
        changes["prompts"] = {}
    return Embedder.load(
        chosen.base if variant.model == "base" else chosen.run / variant.model / "model",
        dtype=getattr(torch, chosen.precision),
        **changes,
    )


if __name__ == "__main__":
    main()
