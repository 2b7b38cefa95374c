"""What does encoding cost, against sentence-transformers.

Sentences per CPU second of MiniLM on Debian descriptions, short and long ones mixed in random
order, one thread, tokenizing included on both sides. Both sort by length; the peer pads batches of
32, its default. Rows compare like with like and with the peer's default precision, and a control
row has texts of one length.

Run: python -m benchmarks.encode_speed
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer
from transformers.utils import logging

from benchmarks.common import Row, interleaved, write_results
from tercet.models.embedder import Embedder
from tercet.models.zoo import zoo

DATA = Path(__file__).parents[1] / "examples/data/packages.en.parquet"
TEXTS = 1_000
SEED = 0
BATCH = 32  # of the peer; its default

Encode = Callable[[list[str]], np.ndarray]


def mixed_texts() -> list[str]:
    """Short and long descriptions of the test split in random order."""
    table = pq.read_table(DATA, columns=["short", "long", "split"]).to_pylist()
    texts = [row[kind] for row in table if row["split"] == "test" for kind in ("short", "long")]
    order = np.random.default_rng(SEED).permutation(len(texts))[:TEXTS]
    return [texts[i] for i in order]


def equal_texts(embedder: Embedder, tokens: int = 32) -> list[str]:
    """Texts of exactly so many tokens: the starts of long descriptions, word by word."""
    found = []
    for text in mixed_texts():
        words = text.split()
        for count in range(4, min(len(words), tokens)):
            start = " ".join(words[:count])
            length = embedder.tokenize([start], "document").lengths[0]
            if length >= tokens:
                found += [start] if length == tokens else []
                break
    return found


def peer(dtype: torch.dtype) -> Encode:
    """sentence-transformers, as a user calls it."""
    model = SentenceTransformer(
        str(zoo.resolve("minilm")), device="cpu", model_kwargs={"dtype": dtype}
    )
    return lambda texts: np.asarray(
        model.encode(texts, batch_size=BATCH, convert_to_tensor=True).float()
    )


def padding_factor(lengths: list[int]) -> float:
    """Token slots in sorted batches of the peer's size, over tokens."""
    ordered = sorted(lengths, reverse=True)
    slots = sum(len(ordered[i : i + BATCH]) * ordered[i] for i in range(0, len(ordered), BATCH))
    return slots / sum(lengths)


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """The smallest cosine of any text's two vectors."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(((found * expected).sum(1) / lengths).min())


def main() -> None:
    """Measure, print, write."""
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    exact, half = Embedder.load("minilm"), Embedder.load("minilm", dtype=torch.bfloat16)
    sides: dict[str, Encode] = {
        "ours float32": exact.encode,
        "ours bfloat16": half.encode,
        "peer float32": peer(torch.float32),
        "peer bfloat16": peer(torch.bfloat16),
    }
    rows: list[Row] = []
    sets = {"natural lengths": mixed_texts(), "control: all of 32 tokens": equal_texts(exact)}
    for name, texts in sets.items():
        lengths = exact.tokenize(texts, "document").lengths
        calls = {side: (lambda encode=encode, t=texts: encode(t)) for side, encode in sides.items()}
        spent = {side: min(seconds) for side, seconds in interleaved(calls, repeats).items()}
        reference = sides["peer float32"](texts)
        pairs = [
            ("ours float32", "peer float32", "ratio >= 1.6"),
            ("ours bfloat16", "peer float32", "ratio >= 3"),
            ("ours bfloat16", "peer bfloat16", None),
        ]
        for ours, other, target in pairs:
            rows.append(
                {
                    "name": f"{name}: {ours} / {other}",
                    "ours": round(len(texts) / spent[ours], 1),
                    "peer": round(len(texts) / spent[other], 1),
                    "unit": "sentences per CPU second",
                    "ratio": spent[other] / spent[ours],
                    "target": target if name.startswith("natural") else "the part beyond padding",
                    "error": 1 - cosine(sides[ours](texts), reference),
                    "padding_factor": padding_factor(lengths),
                    "texts": len(texts),
                    "tokens": sum(lengths),
                    "repeats": repeats,
                }
            )
    write_results("encode_speed", rows)


if __name__ == "__main__":
    main()
