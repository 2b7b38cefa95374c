"""How fast are the steps of LLM2Vec and its encoding, against llm2vec 0.2.3.

Both sides are processes of their own with one thread, driven by the same commands in turn, so a
busy machine disturbs both alike; CPU seconds are compared, peak memory stands beside them. The
model is a small random Llama, the texts are Debian descriptions of the train split in their
natural lengths; a control row has texts of one length. The peer needs an environment of its own:
``benchmarks/llm2vec_peer.py`` says how to make it.

    python -m benchmarks.llm2vec_speed --peer peer/bin/python
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers.utils import logging

from benchmarks.common import Row, write_results
from benchmarks.llm2vec_quality import DATA, sentences_of
from benchmarks.sides import Answer, Side, serve, spent
from tercet.data.batches.collate import Collator
from tercet.data.batches.sampler import BatchPlan, Sampler
from tercet.data.files.texts import open_texts
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.objectives.mntp import MNTP
from tercet.objectives.objective import Objective
from tercet.objectives.simcse import SimCSE

TITLE = "How fast are the steps of LLM2Vec and its encoding, against llm2vec 0.2.3."
REPEATS = 5
VOCABULARIES = (8_000, 32_000, 128_000)
BLOCKS, BLOCK_TOKENS, SENTENCES = 4, 512, 128
LIMIT = 400  # tokens; the peer cuts longer texts by words, so the error is taken on shorter ones


# ---- our side: the same commands as the peer's ---------------------------------------------------


def start_encode(folder: str, texts: str, precision: str = "float32") -> Callable[..., Answer]:
    """A call of ``Embedder.encode`` with the peer's settings: both ways, mean, not scaled."""
    embedder = Embedder.load(
        folder,
        attention="bidirectional",
        dtype=getattr(torch, precision),
        normalize=False,
        pool_special=False,  # llm2vec never pools the beginning-of-text token
    )
    lines = json.loads(Path(texts).read_text(encoding="utf-8"))
    tokens = sum(embedder.tokenize(lines, "document").lengths)

    def step(save: str | None = None) -> Answer:
        vectors = []

        def once() -> Answer:
            vectors.append(embedder.encode(lines))
            return {"tokens": tokens}

        answer = spent(once)
        if save:
            np.save(save, vectors[0])
        return answer

    return step


def start_training(
    objective: Objective, folder: str, texts: str, batch: int, rate: float
) -> Callable[[], Answer]:
    """A step as the training loop takes it: LoRA on every linear layer, clip, AdamW."""
    embedder = Embedder.load(folder, attention="bidirectional")
    embedder.backbone.add_lora(16, 32, 0.05)
    file = Path(texts).with_suffix(".jsonl")
    lines = json.loads(Path(texts).read_text(encoding="utf-8"))
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    collate = Collator(tokenize=embedder.tokenize, prompt_of=lambda role, task: "")
    work = objective.start(embedder, [open_texts(file)], collate)
    sampler = Sampler(work.drawn, BatchPlan(batch_size=batch, seed=0, epochs=1_000))
    weights = [weight for weight in embedder.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)
    embedder.train()
    steps = iter(range(1_000_000))

    def once() -> Answer:
        number = next(steps)
        rows = sampler.next_batch()
        assert rows is not None
        made = work.batch(rows, [0, number])
        losses = work.backward(made, Chunks(max_tokens=2_048, seed=number))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return {"loss": float(losses["loss"]), "tokens": len(made.texts.ids)}

    return lambda: spent(once)


def worker() -> None:
    """Read commands, answer them, until the input ends."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    steps: dict[str, Callable[..., Answer]] = {}

    def answer(do: str, **numbers: Any) -> Answer:
        if do == "encode_start":
            steps["encode"] = start_encode(**numbers)
        elif do == "mntp_start":
            same = numbers.pop("same_work", False)
            objective = MNTP(
                head=numbers["folder"],
                block_tokens=numbers.pop("length"),
                concatenated=same,
                train_head=same,
            )
            batch = numbers.pop("blocks")
            steps["mntp"] = start_training(objective, batch=batch, rate=5e-5, **numbers)
        elif do == "simcse_start":
            objective = SimCSE(max_tokens=numbers.pop("length"))
            steps["simcse"] = start_training(objective, rate=3e-5, **numbers)
        else:
            return steps[do](**numbers)
        return {}

    serve(answer)


# ---- both sides in turn --------------------------------------------------------------------------


def compared(
    name: str, target: float, peer: str, what: str, start: Answer, ours: Answer | None = None
) -> Row:
    """One row: both sides start, warm up once, and then take turns."""
    sides = {
        "ours": Side(sys.executable, "-m", "benchmarks.llm2vec_speed", "--worker"),
        "peer": Side(peer, "-m", "benchmarks.llm2vec_peer"),
    }
    saved = {side: f"{start['texts']}.{side}.npy" for side in sides}
    found: dict[str, list[Answer]] = {side: [] for side in sides}
    for side, answer in sides.items():
        answer(f"{what}_start", **start, **((ours or {}) if side == "ours" else {}))
        answer(what, **({"save": saved[side]} if what == "encode" else {}))
    for _ in range(REPEATS):
        for side, answer in sides.items():
            found[side].append(answer(what))
    for answer in sides.values():
        answer.end()
    rate = {
        side: median(answer["tokens"] / answer["seconds"] for answer in answers)
        for side, answers in found.items()
    }
    return {
        "name": name,
        "ours": round(rate["ours"], 1),
        "peer": round(rate["peer"], 1),
        "unit": "tokens per CPU second",
        "ratio": rate["ours"] / rate["peer"],
        "target": target,
        "error": _error(saved, start) if what == "encode" else None,
        "tokens a step": [round(median(a["tokens"] for a in found[side])) for side in found],
        "CPU s a step": [round(median(a["seconds"] for a in found[side]), 3) for side in found],
        "peak GB": [round(max(a["peak"] for a in found[side]) / 1e9, 2) for side in found],
    }


def _error(saved: dict[str, str], start: Answer) -> float:
    """The largest difference of a coordinate, as a share of the largest one."""
    embedder = Embedder.load(start["folder"])
    lines = json.loads(Path(start["texts"]).read_text(encoding="utf-8"))
    short = np.array(embedder.tokenize(lines, "document").lengths) < LIMIT
    ours, peer = (np.load(saved[side])[short] for side in ("ours", "peer"))
    return float(np.abs(ours - peer).max() / np.abs(peer).max())


def main() -> None:
    """Compare, print and write the rows."""
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--peer", help="the Python of the peer's environment")
    parser.add_argument("--worker", action="store_true", help="be our side")
    parser.add_argument("--only", choices=("mntp", "simcse", "encode"))
    chosen = parser.parse_args()
    if chosen.worker:
        worker()
        return
    if not chosen.peer:
        parser.error("--peer is needed: the Python of an environment with llm2vec 0.2.3")
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        rows = _rows(chosen.peer, Path(scratch), chosen.only)
    if chosen.only is None:
        write_results("llm2vec_speed", rows)
    else:
        print(json.dumps(rows, indent=1))


def _rows(peer: str, scratch: Path, only: str | None) -> list[Row]:
    packages = [p for p in pq.read_table(DATA).to_pylist() if p["split"] == "train"]
    random = np.random.default_rng(0)
    long = [p["long"] for p in packages[:3_000]]
    sentences = list(sentences_of(packages[:3_000]))
    random.shuffle(sentences)
    mixed = [p[kind] for p in packages[3_000:3_200] for kind in ("short", "long")]
    random.shuffle(mixed)
    texts = {"long": long, "sentences": sentences, "mixed": mixed, "lines": sentences[:400]}
    place: dict[str, str] = {}
    for name, lines in texts.items():
        place[name] = str(scratch / f"{name}.json")
        Path(place[name]).write_text(json.dumps(lines), encoding="utf-8")
    maker, models = Side(peer, "-m", "benchmarks.llm2vec_peer"), {}
    for size in VOCABULARIES:
        models[size] = str(scratch / f"llama-{size}")
        maker("make", folder=models[size], texts=place["long"], vocabulary=size)
    maker.end()
    place["equal"] = str(scratch / "equal.json")
    Path(place["equal"]).write_text(json.dumps(_equal(models[8_000], long)), encoding="utf-8")

    rows: list[Row] = []
    if only in (None, "mntp"):
        for size in VOCABULARIES:
            start = {
                "folder": models[size],
                "texts": place["long"],
                "blocks": BLOCKS,
                "length": BLOCK_TOKENS,
            }
            rows.append(compared(f"MNTP step, vocabulary {size:,}", 2.5, peer, "mntp", start))
            name = f"MNTP step, vocabulary {size:,}, the peer's layout, head trained"
            rows.append(compared(name, 1.0, peer, "mntp", start, {"same_work": True}))
    if only in (None, "simcse"):
        for name, kind, target in (
            ("SimCSE step, sentences", "sentences", 3.0),
            ("SimCSE step, texts of one length (control)", "equal", 1.0),
        ):
            start = {
                "folder": models[32_000 if kind == "sentences" else 8_000],
                "texts": place[kind],
                "batch": SENTENCES,
                "length": 128,
            }
            rows.append(compared(name, target, peer, "simcse", start))
    if only in (None, "encode"):
        for name, kind, target in (
            ("encode, one-line and full descriptions", "mixed", 3.0),
            ("encode, sentences", "lines", 3.0),
            ("encode, texts of one length (control)", "equal", 1.0),
        ):
            start = {"folder": models[8_000], "texts": place[kind]}
            rows.append(compared(name, target, peer, "encode", start))
        start = {"folder": models[8_000], "texts": place["mixed"]}
        name = "encode, the same, bfloat16 against float32"
        rows.append(compared(name, 3.0, peer, "encode", start, {"precision": "bfloat16"}))
    return rows


def _equal(folder: str, texts: list[str], tokens: int = 24, count: int = 256) -> list[str]:
    """Texts of exactly so many tokens: the starts of descriptions, word by word."""
    tokenizer = Embedder.load(folder).tokenizer
    found: list[str] = []
    for text in texts:
        words = text.split()
        for length in range(8, min(len(words), tokens)):
            start = " ".join(words[:length])
            if tokenizer([start], 10_000).lengths[0] == tokens:
                found.append(start)
                break
        if len(found) == count:
            break
    return found


if __name__ == "__main__":
    main()
