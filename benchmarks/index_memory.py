"""Memory that an index takes while it is made: how much it grows with the number of documents.

    python -m benchmarks.index_memory

Each row is a separate process. It indexes documents of a given length with a fake model of 64
coordinates, so that only the index is measured, or with a tiny BERT, whose kernels count too.
``anonymous`` and ``peak`` are MB at most: without and with mapped files. ``bytes a document`` is
the growth of the peak over the growth of the number of documents.
"""

import argparse
import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Row
from benchmarks.sides import memory
from tercet.data.files.documents import read_documents
from tercet.models.embedder import Embedder
from tercet.search.text_index import index
from tercet.vectors import Vectors

TARGET = 100  # bytes a document
DIM = 64
ROWS = ((100, 20_000, 80_000), (2_000, 16_000, 64_000))  # characters, numbers of documents


class FakeModel:
    """Random vectors, at no cost."""

    kinds, dim = ("dense",), DIM

    def fingerprint(self) -> str:
        """Name it."""
        return "fake"

    def encode_vectors(self, texts: list[str], role: str, **_: Any) -> Vectors:
        """Return a vector for each text."""
        drawn = torch.Generator().manual_seed(len(texts[0]))
        return Vectors(dense=torch.randn(len(texts), DIM, generator=drawn))


def side(count: int, characters: int, model: str, folder: Path) -> dict[str, int]:
    """Index ``count`` documents in this process; return its peaks in bytes."""
    torch.set_num_threads(1)
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(5_000)]
    with (folder / "docs.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(drawn.choices(words, k=characters // 6))[:characters]
            file.write(json.dumps({"id": f"doc-{number}", "text": text}) + "\n")
    load: Any = (lambda name, dtype: FakeModel()) if model == "fake" else None
    load = load or (lambda name, dtype: Embedder.load(name))
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, memory("RssAnon"))

    watching = threading.Thread(target=watch)
    watching.start()
    index(lambda: read_documents(folder / "docs.jsonl"), model, folder / "index", load=load)
    done.set()
    watching.join()
    return {"anonymous": peak, "peak": memory("VmHWM")}


def measured(count: int, characters: int, model: str) -> dict[str, int]:
    """Return the peaks of another process."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.index_memory", "--side"]
        words = [*command, str(count), str(characters), model, folder]
        ended = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", nargs=4)
    parser.add_argument("--model", default="fake", help="fake, or a model's name or folder")
    chosen = parser.parse_args()
    if chosen.side:
        count, characters, model, folder = chosen.side
        found = side(int(count), int(characters), model, Path(folder))
        sys.stdout.write(json.dumps(found) + "\n")
        return
    rows: list[Row] = []
    for characters, low, high in ROWS:
        few, many = (measured(count, characters, chosen.model) for count in (low, high))
        grown = (many["peak"] - few["peak"]) / (high - low)
        rows.append(
            {
                "name": f"{characters:,} characters, {chosen.model}: {low:,} to {high:,} documents",
                "bytes a document": round(grown),
                "peak MB": [round(each["peak"] / 1e6) for each in (few, many)],
                "anonymous MB": [round(each["anonymous"] / 1e6) for each in (few, many)],
                "target": f"at most {TARGET} bytes a document",
            }
        )
    common.write_results("index_memory", rows)


if __name__ == "__main__":
    main()
