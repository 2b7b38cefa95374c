"""What does encoding cost on a CPU, against other libraries.

Debian descriptions of the test split, one thread, CPU seconds, tokenizing included. Every side is a
process that gets the same texts; they take turns, each runs once before it counts, and the best of
the repeats is taken. Without ``--peers`` and ``--llama`` the peer is sentence-transformers alone.

- ``two words``: milliseconds of CPU of a short query, the median of the best repeat; ``clock_ms``:
  by the clock.
- ``requests of 1`` and ``of 8``: texts of all lengths in random order, one call a request.
- ``sorted``: 120 long and 180 short descriptions, shuffled, in one call; each side may sort.
  Larger models get a part of the texts.
- ``control``: texts of 32 tokens, where nobody pads.
- ``error``: the largest 1 - cosine of our vectors to sentence-transformers' in float32, for smollm2
  to ours in float32; ``peer_error`` that of the peer's; a mean stands beside each.
- ``padding_factor``: token slots that the peer's model reads, over tokens. OpenVINO and ONNX
  Runtime run in sorted batches of 32 and in groups of equal length; the better of both counts.
- ``memory``: the highest resident bytes of a fresh process from its start on: ``tercet encode`` and
  ``tercet index`` beside ``encode`` of sentence-transformers in the same precision. Texts repeat
  with a number, one of 30 is a long description.
- ``tercet`` is frozen (``Embedder.freeze``), as the models of ``tercet serve`` and of an index are;
  ``tercet, not frozen`` looks for changed weights at each call.
- ``XLM-R`` and ``ModernBERT`` have random weights: their int8 error says nothing about quality.

``benchmarks/encode_peer.py`` says how to make the peers' environments. Rows that were
not measured stay in the file, each with the commit that measured it.

    python -m benchmarks.encode_speed --peers peers/bin/python --llama llama/bin/python
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

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
from tercet.models.zoo.zoo import find

DATA = Path(__file__).parents[1] / "examples/data/packages.en.parquet"
TITLE = "What does encoding cost on a CPU, against other libraries."
TEXTS = 1_000
SEED = 0
REPEATS = 3
LONG, SHORT = 120, 180  # descriptions of the sorted set
QUERIES = 100  # calls with two words
COUNTS = 3_000, 20_000, 100_000  # texts whose memory is measured
LONGEST = COUNTS[-1]  # takes a quarter of an hour

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


def start_ours(folder: str, precision: str, limit: int, **places: str) -> Embedder:
    """Our side: mean pooling, no prompts, since the texts of all sides are the same."""
    return Embedder.load(
        quantized(folder, **places) if precision == "int8" else folder,
        dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32,
        pooling="mean",
        normalize=True,
        prompts={},
        document_tokens=limit,
    )


def quantized(folder: str, scratch: str, calibration: str) -> str:
    """The model with 8-bit weights, by our command, whatever they lose."""
    texts, out = Path(scratch, "calibration.jsonl"), str(Path(scratch, "tercet-int8"))
    lines = json.loads(Path(calibration).read_text(encoding="utf-8"))
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    words = ["quantize", folder, "--data", str(texts), "--min-cosine", "0", "--out", out]
    subprocess.run([sys.executable, "-m", "tercet", *words], check=True)
    return out


def worker() -> None:
    """Be our side: the commands are those of ``encode_peer``."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    started: list[Embedder] = []

    def answer(do: str, **given: Any) -> Answer:
        if do == "start":
            unfrozen = given.pop("engine") == UNFROZEN
            embedder = start_ours(**given)
            started.append(embedder if unfrozen else embedder.freeze())
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


SETS = "two words", "requests of 1", "requests of 8", "sorted", "control, all of 32 tokens"


@dataclass(frozen=True)
class TextSet:
    """Requests of a case, and what we hold ourselves to."""

    name: str
    requests: list[Texts]
    targets: dict[str, str]  # precision, or peer and precision: of that row

    def target(self, peer: str, precision: str) -> str | None:
        """What a row should reach."""
        if peer == UNFROZEN:
            return None
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
    sets = (
        ([["short query"]] * QUERIES, query),
        ([[text] for text in texts[: 60 // part]], one),
        (eights[: len(eights) // part], eight),
        ([texts[: len(texts) // part]], many),
        ([equal_texts(embedder)[: 240 // part]], {}),
    )
    return [TextSet(name, *each) for name, each in zip(SETS, sets, strict=True)]


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


def sides_of(library: str, *precisions: str) -> list[SideName]:
    """A library in several precisions."""
    return [SideName(library, each) for each in precisions]


EXACT = "float32", "bfloat16"
OURS = sides_of("tercet", *EXACT, "int8")
UNFROZEN = "tercet, not frozen"  # a row like those of peers
PLAIN = sides_of("sentence-transformers", *EXACT)
GRAPHS = [
    *sides_of("OpenVINO", "float32", "bfloat16", "int8", "int8-bfloat16"),
    *sides_of("ONNX Runtime", "float32", "int8"),
]
LLAMA = sides_of("llama.cpp", "float32", "bfloat16", "int8", "Q4_1")


@dataclass(frozen=True)
class Model:
    """A model, and how much of the texts it gets."""

    name: str
    part: int = 1  # one of this many texts
    limit: int = 256  # tokens of a text

    def sides(self, given: argparse.Namespace) -> list[SideName]:
        """Sides that can run it."""
        ours = [*OURS, *sides_of(UNFROZEN, *EXACT)]
        if self.name == DECODER:  # sentence-transformers would apply its chat template
            return [*ours, *(LLAMA if given.llama else [])]
        return [*ours, *PLAIN, *(GRAPHS if given.peers else [])]


DECODER = "smollm2"
MODELS = (
    Model("minilm"),
    Model("me5-small", 2),
    Model("XLM-R", 4),
    Model("ModernBERT", 4),
    Model(DECODER, 8, limit=512),  # llama.cpp cuts at what it reads at a time
)


@dataclass
class Measured:
    """A side in a case, in its better grouping."""

    seconds: float
    ms: float  # CPU milliseconds of a request: the median of the best repeat
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
                min(median(run["cpu_ms"]) for run in runs[way]),
                min(median(run["ms"]) for run in runs[way]),
                read[way]["slots"] / read[way]["tokens"] if read[way]["tokens"] else 1.0,
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
        precisions = (peer.group,) if peer.group in EXACT else ("int8", "bfloat16")
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
    model: Model, given: argparse.Namespace, scratch: Path, stack: ExitStack
) -> dict[SideName, Side]:
    """Processes with the model loaded, one for each side."""
    folder, place = model_folder(model.name, scratch), scratch / f"{model.name}-made"
    place.mkdir()
    calibration = scratch / "calibration.json"
    calibration.write_text(json.dumps(descriptions("train", LONG, SHORT)), encoding="utf-8")
    sides = {}
    for name in model.sides(given):
        side = sides[name] = new_side(name.library, given)
        stack.callback(side.end)
        side(
            "start",
            engine=name.library,
            folder=str(gguf(model.name) if name in LLAMA else folder),
            limit=model.limit,
            precision=name.precision,
            scratch=str(place),
            calibration=str(calibration),
        )
        print(f"{model.name}: {name} has started", flush=True)
    return sides


def new_side(library: str, given: argparse.Namespace) -> Side:
    """A process of a library."""
    if library in ("tercet", UNFROZEN):
        return Side(sys.executable, "-m", "benchmarks.encode_speed", "--worker")
    python = given.llama if library == "llama.cpp" else given.peers or sys.executable
    return Side(python, "-m", "benchmarks.encode_peer")


def gguf(name: str) -> Path:
    """The file of a model of the zoo that comes as one."""
    model = find(name)
    assert model is not None, name
    package, file = model.files[0].split("/", maxsplit=1)
    spec = find_spec(package)  # importing it would need others
    assert spec is not None and spec.submodule_search_locations, package
    return Path(spec.submodule_search_locations[0], file)


def speed(
    model: Model, given: argparse.Namespace, scratch: Path
) -> Iterator[tuple[str, list[Row]]]:
    """Rows of all chosen cases of a model."""
    if not any(is_chosen(f"{model.name}, {name}", given) for name in SETS):
        return
    embedder = start_ours(str(model_folder(model.name, scratch)), "float32", model.limit)
    sets = [
        each
        for each in text_sets(embedder, model.part)
        if is_chosen(f"{model.name}, {each.name}", given)
    ]
    del embedder
    with ExitStack() as stack:
        bench = Bench(started(model, given, scratch, stack), scratch, given.repeats)
        for each in sets:
            rows = list(rows_of(model.name, each, bench.case(each)))
            for row in rows:
                print(f"{row['name']}: {row['ours']} / {row['peer']}", flush=True)
            yield f"{model.name}, {each.name}", rows


# ---- memory --------------------------------------------------------------------------------------


def many_texts(count: int) -> Texts:
    """One-line descriptions, with a number where they repeat; one of 30 is a long one."""
    rows = pq.read_table(DATA, filters=[("split", "==", "train")]).to_pylist()
    return [
        f"{rows[i % len(rows)]['long' if i % 30 == 0 else 'short']} {i // len(rows) or ''}".strip()
        for i in range(count)
    ]


def command_peak(command: str, texts: Path, scratch: Path, dtype: str) -> int:
    """Bytes at most of a command of tercet."""
    out = scratch / ("index" if command == "index" else "vectors.npy")
    words = [command, str(texts), "--model", "minilm", "--dtype", dtype, "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "tercet", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak = 0
    while process.poll() is None:
        with suppress(SystemExit, OSError):  # it may just have ended
            peak = max(peak, memory("VmHWM", process.pid))
        time.sleep(0.01)
    if process.returncode:
        assert process.stderr is not None
        raise SystemExit(f"tercet {command} must end well; it said: {process.stderr.read()!r}")
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return peak


def peer_peak(texts: Path, scratch: Path, dtype: str) -> int:
    """Bytes at most of sentence-transformers' process."""
    side = new_side("sentence-transformers", argparse.Namespace(peers=None))
    folder = str(zoo.resolve("minilm"))
    side("start", engine="sentence-transformers", folder=folder, limit=256, precision=dtype)
    saved = str(scratch / "vectors.npy")
    answer = side("encode", requests=str(texts), grouping="32", save=saved)
    side.end()
    return answer["peak"]


def peaks(count: int, dtype: str, scratch: Path) -> list[Row]:
    """Rows of the memory of encode and index for this number of texts."""
    texts, lines, request = many_texts(count), scratch / "texts.jsonl", scratch / "request.json"
    lines.write_text(
        "".join(json.dumps({"id": str(i), "text": t}) + "\n" for i, t in enumerate(texts))
    )
    request.write_text(json.dumps([texts]))
    theirs = peer_peak(request, scratch, dtype)
    rows = []
    for command in ("encode", "index"):
        ours = command_peak(command, lines, scratch, dtype)
        print(f"memory, {count:,} texts, {command}, {dtype}: {ours} / {theirs}", flush=True)
        rows.append(
            {
                "name": f"memory, {count:,} texts, {dtype}: {command} / encode of the peer",
                "ours": round(ours / 1e6),
                "peer": round(theirs / 1e6),
                "unit": "MB at the peak",
                "ratio": theirs / ours,
                "target": "ratio >= 1",
                "texts": count,
            }
        )
    return rows


# ---- what runs -----------------------------------------------------------------------------------


def is_chosen(case: str, given: argparse.Namespace) -> bool:
    """Whether a case is to be run."""
    return not given.only or any(word in case for word in given.only)


def with_kept(cases: dict[str, list[Row]], file: Path) -> list[Row]:
    """Measured rows, and those in the file that were not measured now."""
    now = commit()
    rows = [{**row, "commit": now} for each in cases.values() for row in each]
    if not file.exists():
        return rows
    old, names = json.loads(file.read_text(encoding="utf-8")), {row["name"] for row in rows}
    kept = [{"commit": old["commit"], **row} for row in old["rows"] if row["name"] not in names]
    return [*rows, *kept]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--peers", help="the Python of OpenVINO, ONNX Runtime and others")
    parser.add_argument("--llama", help="the Python of llama.cpp")
    parser.add_argument("--only", nargs="+", help="words in the names of cases; default: all")
    parser.add_argument("--longest", action="store_true", help="memory of 100,000 texts, too")
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
            for count, dtype in product(COUNTS, EXACT):
                case = f"memory, {count:,} texts, {dtype}"
                if is_chosen(case, given) and (count < LONGEST or given.longest):
                    cases[case] = peaks(count, dtype, Path(folder))
    finally:  # what was measured before an interrupt is kept
        write(cases, given)


def write(cases: dict[str, list[Row]], given: argparse.Namespace) -> None:
    """Print and write rows, with versions of the peers."""
    versions: dict[str, str] = {}
    for library in ("llama.cpp", "OpenVINO") if given.llama else ("OpenVINO",):
        peer = new_side(library, given)
        versions |= peer("versions")
        peer.end()
    path = write_results("encode_speed", with_kept(cases, given.out), out=given.out)
    results = json.loads(path.read_text(encoding="utf-8"))
    load = [round(each, 2) for each in os.getloadavg()]
    results |= {"repeats": given.repeats, "load_average_at_end": load, "peers": versions}
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console().print(f"wrote {path}")


if __name__ == "__main__":
    main()
