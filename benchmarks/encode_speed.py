"""What does encoding cost on a CPU, against other libraries.

Debian descriptions of the test split, one thread, CPU seconds, tokenizing included. Every side is a
process that gets the same texts; they take turns, each runs once before it counts, and the best of
the repeats is taken. Without ``--peers`` the peer is sentence-transformers alone.

- ``two words``: milliseconds of CPU of one short query, median; ``clock_ms`` by the clock.
- ``requests of 1`` and ``of 8``: texts of all lengths in random order, one call a request.
- ``sorted``: 120 long and 180 short descriptions, shuffled, in one call; each side may sort.
  Larger models get a part of the texts.
- ``control``: texts of 32 tokens, where nobody pads.
- ``error``: the largest 1 - cosine of our vectors to sentence-transformers' in float32,
  ``peer_error`` that of the peer's; a mean stands beside each.
- ``padding_factor``: token slots that the peer's model reads, over tokens. OpenVINO and ONNX
  Runtime run in sorted batches of 32 and in groups of equal length; the better of both counts.
- ``XLM-R`` and ``ModernBERT`` have random weights: their int8 error says nothing about quality.

``benchmarks/encode_peer.py`` says how to make the peers' environments. Rows that ``--only`` leaves
out stay in the file, each with the commit that measured it.

    python -m benchmarks.encode_speed --peers peers/bin/python
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from transformers import AutoModel, AutoTokenizer, ModernBertConfig, XLMRobertaConfig
from transformers.utils import logging

from benchmarks.common import RESULTS, Row, commit, write_results
from benchmarks.sides import Answer, Side, memory, serve, timed
from tercet.models.embedder import Embedder
from tercet.models.zoo import zoo

DATA = Path(__file__).parents[1] / "examples/data/packages.en.parquet"
TITLE = "What does encoding cost on a CPU, against other libraries."
TEXTS = 1_000
SEED = 0
REPEATS = 3
LIMIT = 256  # tokens of a text
LONG, SHORT = 120, 180  # descriptions of the sorted set
QUERIES = 100  # calls with two words

Texts = list[str]


# ---- texts ---------------------------------------------------------------------------------------


def mixed_texts() -> Texts:
    """Short and long descriptions of the test split in random order."""
    table = pq.read_table(DATA, columns=["short", "long", "split"]).to_pylist()
    texts = [row[kind] for row in table if row["split"] == "test" for kind in ("short", "long")]
    order = np.random.default_rng(SEED).permutation(len(texts))[:TEXTS]
    return [texts[i] for i in order]


def equal_texts(embedder: Embedder, tokens: int = 32) -> Texts:
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


def descriptions(split: str, long: int, short: int) -> Texts:
    """So many long and short descriptions of a split, each of another package, shuffled."""
    rows = pq.read_table(DATA, filters=[("split", "==", split)]).to_pylist()
    random = np.random.default_rng(SEED)
    order = random.permutation(len(rows))[: long + short]
    texts = [rows[row]["long" if i < long else "short"] for i, row in enumerate(order)]
    return [texts[i] for i in random.permutation(len(texts))]


# ---- models --------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {
    "vocab_size": 30_522,  # of MiniLM's tokenizer
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "pad_token_id": 0,
    "max_position_embeddings": 514,
}
RANDOM: dict[str, Callable[[], Any]] = {
    "XLM-R": lambda: XLMRobertaConfig(**WIDE, intermediate_size=3_072, type_vocab_size=1),
    "ModernBERT": lambda: ModernBertConfig(
        **WIDE, intermediate_size=1_152, cls_token_id=101, sep_token_id=102
    ),
}


def model_folder(name: str, scratch: Path) -> Path:
    """A model of the zoo, or one of a known shape with random weights."""
    if name not in RANDOM:
        return Path(zoo.resolve(name))
    folder = scratch / name
    if not folder.exists():
        torch.manual_seed(SEED)
        AutoModel.from_config(RANDOM[name]()).save_pretrained(folder)
        AutoTokenizer.from_pretrained(zoo.resolve("minilm")).save_pretrained(folder)
    return folder


def start_ours(folder: str, precision: str, **_: str) -> Embedder:
    """Our side: mean pooling, no prompts, since the texts of all sides are the same."""
    return Embedder.load(
        folder,
        dtype=getattr(torch, precision),
        pooling="mean",
        normalize=True,
        prompts={},
        document_tokens=LIMIT,
    )


def worker() -> None:
    """Be our side: the commands are those of ``encode_peer``."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    started: list[Embedder] = []

    def answer(do: str, **given: Any) -> Answer:
        if do == "start":
            given.pop("engine")
            started.append(start_ours(**given))
            return {}
        embedder, requests = started[0], json.loads(Path(given["requests"]).read_text("utf-8"))
        if given["save"]:
            texts = [text for request in requests for text in request]
            tokens = sum(embedder.tokenize(texts, "document").lengths)
            np.save(given["save"], np.concatenate([embedder.encode(each) for each in requests]))
            return {"slots": tokens, "tokens": tokens, "peak": memory("VmHWM")}
        return timed(requests, embedder.encode)

    serve(answer)


# ---- cases ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextSet:
    """Requests of a case, and what we hold ourselves to."""

    name: str
    requests: list[Texts]
    targets: dict[str, str]  # precision, or peer and precision: of that row

    def target(self, peer: str, precision: str) -> str | None:
        """What a row should reach."""
        return self.targets.get(f"{peer} {precision}", self.targets.get(precision))


def text_sets(embedder: Embedder, part: int) -> list[TextSet]:
    """The five sets of texts; ``part``: one of this many texts."""
    texts = descriptions("test", LONG, SHORT)
    eights = [texts[i : i + 8] for i in range(0, 200, 8)]
    best = "ratio >= {} against the best peer"
    query = {"float32": "ours <= 3 ms", "bfloat16": "ours <= 1.5 ms", "int8": "ours <= 1 ms"}
    one, eight = (dict.fromkeys(query, best.format(bound)) for bound in (1, 2.5))
    many = {
        "OpenVINO float32": "ratio >= 1.4",
        "OpenVINO bfloat16": "ratio >= 1.4",
        "OpenVINO int8": "ratio >= 1.25, error no larger",
    }
    return [
        TextSet("two words", [["short query"]] * QUERIES, query),
        TextSet("requests of 1", [[text] for text in texts[: 60 // part]], one),
        TextSet("requests of 8", eights[: max(1, len(eights) // part)], eight),
        TextSet("sorted", [texts[: len(texts) // part]], many),
        TextSet("control, all of 32 tokens", [equal_texts(embedder)[: 240 // part]], {}),
    ]


@dataclass(frozen=True)
class SideName:
    """A library and a precision."""

    library: str
    precision: str

    def __str__(self) -> str:
        return f"{self.library} {self.precision}"

    @property
    def group(self) -> str:
        """The precision of ours that it is compared with."""
        return self.precision.split("-", maxsplit=1)[0]


OURS = [SideName("tercet", "float32"), SideName("tercet", "bfloat16")]
PLAIN = [SideName("sentence-transformers", each) for each in ("float32", "bfloat16")]
GRAPHS = [
    *(SideName("OpenVINO", each) for each in ("float32", "bfloat16", "int8", "int8-bfloat16")),
    *(SideName("ONNX Runtime", each) for each in ("float32", "int8")),
]
MODELS = {"minilm": 1, "me5-small": 2, "XLM-R": 4, "ModernBERT": 4}  # part of the texts


@dataclass
class Measured:
    """A side in a case, in its better grouping."""

    seconds: float
    ms: float  # CPU milliseconds of a request, median
    clock_ms: float
    padding: float
    errors: np.ndarray = field(repr=False)

    def facts(self, which: str) -> Row:
        """What a row says beside the number."""
        return {
            f"{which}error": float(self.errors.max()),
            f"{which}mean_error": float(self.errors.mean()),
            f"{which}clock_ms": round(self.clock_ms, 3),
        }


class Bench:
    """Sides that have started with one model, and run in turn."""

    def __init__(self, sides: dict[SideName, Side], scratch: Path, repeats: int) -> None:
        self.sides, self.scratch, self.repeats = sides, scratch, repeats

    def case(self, case: TextSet) -> dict[SideName, Measured]:
        """Each side's best."""
        file, saved = self.scratch / "requests.json", str(self.scratch / "vectors.npy")
        file.write_text(json.dumps(case.requests), encoding="utf-8")
        vectors, read, runs = {}, {}, {}
        alone = all(len(request) == 1 for request in case.requests)
        ways = [
            (name, grouping)
            for name in self.sides
            for grouping in (("32",) if alone or name not in GRAPHS else ("32", "equal"))
        ]
        for name, grouping in ways:
            way = name, grouping
            read[way] = self._encode(name, file, grouping, saved)
            vectors[way], runs[way] = np.load(saved), []
        for _ in range(self.repeats):
            for way in ways:
                runs[way].append(self._encode(way[0], file, way[1], None))
        expected = next(iter(vectors.values()))
        for way in ways:
            if str(way[0]) == "sentence-transformers float32":
                expected = vectors[way]
        found: dict[SideName, Measured] = {}
        for way in ways:
            measured = Measured(
                min(run["seconds"] for run in runs[way]),
                median(ms for run in runs[way] for ms in run["cpu_ms"]),
                median(ms for run in runs[way] for ms in run["ms"]),
                read[way]["slots"] / read[way]["tokens"],
                distances(vectors[way], expected),
            )
            if way[0] not in found or measured.seconds < found[way[0]].seconds:
                found[way[0]] = measured
        return found

    def _encode(self, name: SideName, file: Path, grouping: str, save: str | None) -> Answer:
        return self.sides[name]("encode", requests=str(file), grouping=grouping, save=save)


def distances(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """1 - cosine of each text's two vectors."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return 1 - (found * expected).sum(1) / lengths


def rows_of(model: str, case: TextSet, found: dict[SideName, Measured]) -> Iterator[Row]:
    """A row for each peer, beside ours in its precision."""
    texts, query = [text for request in case.requests for text in request], case.name == "two words"
    for peer, theirs in found.items():
        if peer in OURS:
            continue
        precisions = (peer.group, "bfloat16") if peer.group == "int8" else (peer.group,)
        for precision in precisions:
            ours = found.get(SideName("tercet", precision))
            if ours is None:
                continue
            numbers = [each.ms if query else each.seconds for each in (ours, theirs)]
            yield {
                "name": f"{model}, {case.name}: {precision} / {peer}",
                "ours": round(numbers[0], 3),
                "peer": round(numbers[1], 3),
                "unit": "CPU ms a query" if query else "CPU s",
                "ratio": numbers[1] / numbers[0],
                "target": case.target(peer.library, precision),
                **ours.facts(""),
                **theirs.facts("peer_"),
                "padding_factor": theirs.padding,
                "texts": len(texts),
            }


def started(
    model: str,
    names: Sequence[SideName],
    given: argparse.Namespace,
    scratch: Path,
    stack: ExitStack,
) -> dict[SideName, Side]:
    """Processes with the model loaded, one for each side."""
    folder, place = model_folder(model, scratch), scratch / f"{model}-made"
    place.mkdir()
    calibration = scratch / "calibration.json"
    calibration.write_text(json.dumps(descriptions("train", LONG, SHORT)), encoding="utf-8")
    sides = {}
    for name in names:
        side = sides[name] = new_side(name.library, given)
        stack.callback(side.end)
        side(
            "start",
            engine=name.library,
            folder=str(folder),
            precision=name.precision,
            scratch=str(place),
            calibration=str(calibration),
        )
        print(f"{model}: {name} has started", flush=True)
    return sides


def new_side(library: str, given: argparse.Namespace) -> Side:
    """A process of a library."""
    if library == "tercet":
        return Side(sys.executable, "-m", "benchmarks.encode_speed", "--worker")
    return Side(given.peers or sys.executable, "-m", "benchmarks.encode_peer")


def speed(model: str, given: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, list[Row]]]:
    """Rows of all chosen cases of a model."""
    embedder = start_ours(str(model_folder(model, scratch)), "float32")
    sets = [
        each
        for each in text_sets(embedder, MODELS[model])
        if is_chosen(f"{model}, {each.name}", given)
    ]
    del embedder
    if not sets:
        return
    names = [*OURS, *PLAIN, *(GRAPHS if given.peers else [])]
    with ExitStack() as stack:
        bench = Bench(started(model, names, given, scratch, stack), scratch, given.repeats)
        for each in sets:
            rows = list(rows_of(model, each, bench.case(each)))
            for row in rows:
                print(f"{row['name']}: {row['ours']} / {row['peer']}", flush=True)
            yield f"{model}, {each.name}", rows


def is_chosen(case: str, given: argparse.Namespace) -> bool:
    """Whether a case is to be run."""
    return not given.only or any(word in case for word in given.only)


def with_kept(cases: dict[str, list[Row]], file: Path) -> list[Row]:
    """Measured rows, and those in the file of cases that were not run."""
    now = commit()
    rows = [{**row, "commit": now} for each in cases.values() for row in each]
    if not file.exists():
        return rows
    old = json.loads(file.read_text(encoding="utf-8"))
    kept = [
        {"commit": old["commit"], **row}
        for row in old["rows"]
        if row["name"].split(": ", maxsplit=1)[0] not in cases
    ]
    return [*rows, *kept]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--peers", help="the Python of OpenVINO, ONNX Runtime and others")
    parser.add_argument("--only", nargs="+", help="words in the names of cases; default: all")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--out", type=Path, default=RESULTS / "encode_speed.json")
    parser.add_argument("--worker", action="store_true", help="be our side")
    given = parser.parse_args()
    if given.worker:
        worker()
        return
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    cases: dict[str, list[Row]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for model in MODELS:
                for case, rows in speed(model, given, Path(folder)):
                    cases[case] = rows
    finally:  # what was measured before an interrupt is kept
        write(cases, given)


def write(cases: dict[str, list[Row]], given: argparse.Namespace) -> None:
    """Print and write rows, with versions of the peers."""
    peer = new_side("peer", given)
    versions = peer("versions")
    peer.end()
    path = write_results("encode_speed", with_kept(cases, given.out), out=given.out)
    results = json.loads(path.read_text(encoding="utf-8"))
    load = [round(each, 2) for each in os.getloadavg()]
    results |= {"repeats": given.repeats, "load_average_at_end": load, "peers": versions}
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print(f"wrote {path}")


if __name__ == "__main__":
    main()
