"""How much memory a training batch of 32,768 pairs takes, and that its gradient is the right one.

One step as the training loop takes it, on one CPU thread in float32: texts to tokens, every query
against all documents, temperature 0.02, the whole width and half of it (Matryoshka), backward. The
network is a random BERT of two layers and 64 numbers, without dropout. A query is the one-line
description of a Debian package, cut at 32 tokens, a document the first 300 characters of its full
description, cut at 256 tokens; a batch of more pairs than there are packages takes some once more,
with a number before both texts.

- Memory is the peak above what the process holds before the step (weights, texts as strings), each
  batch in a process of its own, with ``memory_gb`` 0.25 for what is kept.
- The peer keeps the graphs of all chunks: what a step takes that embeds no text twice.
- ``error`` is the length of the difference of two gradients over that of one: of a batch in other,
  small chunks with no graph kept, and of one in the usual chunks with no graph kept, where it is
  zero to the last bit.

Run: python -m benchmarks.huge_batch
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import torch
import transformers as t
from tokenizers import BertWordPieceTokenizer
from torch import Tensor
from transformers.utils import logging

from benchmarks.common import Row, extra_memory, write_results
from tercet.data.batches.collate import Collator
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.objectives.contrastive import Contrastive
from tercet.training.memory import step_memory
from tercet.training.recipe import Run
from tercet.types import Example

DATA = Path(__file__).parents[1] / "examples/data/packages.en.parquet"
SIZES = (2_048, 8_192, 32_768)
HIDDEN = 64
MEMORY_GB = 0.25
USUAL = 2_048  # tokens of a chunk, as on any CPU
SMALL = 500
CUT = 300  # characters


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is taken."""

    size: int
    chunk_tokens: int = USUAL
    memory_gb: float | None = MEMORY_GB  # None: every graph is kept


def examples(size: int) -> list[Example]:
    """So many pairs, all of them different."""
    packages = pq.read_table(DATA, columns=["short", "long"]).to_pylist()
    found = []
    for number in range(size):
        round_, place = divmod(number, len(packages))
        before = f"{round_} " if round_ else ""
        package = packages[place]
        found.append(Example(before + package["short"], (before + package["long"][:CUT],)))
    return found


def make_model(folder: Path) -> None:
    """A random BERT that drops nothing out, and a vocabulary of these texts."""
    texts = [example.positives[0] for example in examples(2_000)]
    words = BertWordPieceTokenizer()
    words.train_from_iterator(texts, vocab_size=8_000, show_progress=False)
    words.save_model(str(folder))
    vocabulary = str(folder / "vocab.txt")
    t.BertTokenizerFast(vocabulary).save_pretrained(folder)  # pyright: ignore
    torch.manual_seed(0)
    config = t.BertConfig(
        vocab_size=8_000,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    t.BertModel(config).save_pretrained(folder)


def prepared(folder: Path, way: Way, out: Path) -> Callable[[], None]:
    """A step whose texts and model are there; what comes of it is written to ``out``."""
    logging.disable_progress_bar()
    embedder = Embedder.load(folder, query_tokens=32, document_tokens=256, pooling="first").train()
    collate = Collator(tokenize=embedder.tokenize, prompt_of=lambda role, task: "")
    work = Contrastive(temperature=0.02, dims=(HIDDEN // 2,)).start(embedder, [], collate)
    run = Run(device="cpu", memory_gb=way.memory_gb)
    room = step_memory(embedder, work.kinds, run).budget
    given = examples(way.size)

    def step() -> None:
        began = time.process_time()
        batch = collate(given, [0])
        kept = None if way.memory_gb is None else room.graph_tokens(batch.texts)
        loss = work.backward(batch, Chunks(way.chunk_tokens, kept))["loss"]
        torch.save(
            {
                "loss": float(loss),
                "seconds": time.process_time() - began,
                "tokens": len(batch.texts.ids),
                "kept tokens": len(batch.texts.ids) if kept is None else kept,
                "gradient": [p.grad for p in embedder.parameters() if p.grad is not None],
            },
            out,
        )

    return step


def taken(folder: Path, way: Way) -> Row:
    """The peak memory of a step in GB, and what it found."""
    out = folder / "step.pt"
    memory = extra_memory(partial(prepared, folder, way, out)) / 1e9
    return {"memory": memory, **torch.load(out)}


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """The length of the difference over the expected length."""
    one, other = (torch.cat([x.flatten() for x in side]).double() for side in (found, expected))
    return float((one - other).norm() / other.norm())


def memory_row(size: int, ours: Row, peer: Row | None, smallest: Row) -> Row:
    """One size."""
    return {
        "name": f"peak memory of a step, {size:,} pairs",
        "ours": ours["memory"],
        "peer": None if peer is None else peer["memory"],
        "unit": "GB",
        "ratio": None if peer is None else peer["memory"] / ours["memory"],
        "target": "32,768 pairs: at most twice what 2,048 take",
        "error": None if peer is None else gap(ours["gradient"], peer["gradient"]),
        "times the smallest": ours["memory"] / smallest["memory"],
        "tokens": ours["tokens"],
        "kept_tokens": ours["kept tokens"],
        "cpu_seconds": ours["seconds"],
        "loss": ours["loss"],
    }


def gradient_row(name: str, other: Row, usual: Row, limit: float) -> Row:
    """The same batch, taken another way; the peer is the usual one."""
    return {
        "name": f"gradient of {name}",
        "ours": other["memory"],
        "peer": usual["memory"],
        "unit": "GB",
        "ratio": None,
        "target": f"error <= {limit:g}",
        "error": gap(other["gradient"], usual["gradient"]),
        "tokens": other["tokens"],
        "kept_tokens": other["kept tokens"],
        "cpu_seconds": other["seconds"],
        "loss": other["loss"],
    }


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder)
        steps = {size: taken(folder, Way(size=size)) for size in SIZES}
        whole = taken(folder, Way(size=SIZES[0], memory_gb=None))
        small = taken(folder, Way(size=SIZES[-1], chunk_tokens=SMALL, memory_gb=0.0))
        bare = taken(folder, Way(size=SIZES[1], memory_gb=0.0))
    first, last = steps[SIZES[0]], steps[SIZES[-1]]
    rows = [memory_row(n, steps[n], whole if n == SIZES[0] else None, first) for n in SIZES]
    rows += [
        gradient_row(f"{SIZES[-1]:,} pairs in chunks of {SMALL} tokens", small, last, 1e-5),
        gradient_row(f"{SIZES[1]:,} pairs with no graph kept", bare, steps[SIZES[1]], 0.0),
    ]
    write_results("huge_batch", rows, "tokenizers")


if __name__ == "__main__":
    main()
