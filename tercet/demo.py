"""The whole job on real texts in a few minutes: train, measure honestly, search, report."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from tercet.data.sources import open_source, write_examples
from tercet.errors import DataError
from tercet.evaluate.embedders import Measured, dev_score, measure, measure_bm25
from tercet.evaluate.intervals import Interval, paired_difference
from tercet.evaluate.report import ExampleSearch, RunReport, ScoreSample, write_report
from tercet.evaluate.retrieval import METRICS, RetrievalSet
from tercet.nn.embedder import Embedder
from tercet.recipes.finetune import finetune
from tercet.search.exact import ExactIndex, Hit
from tercet.train import log
from tercet.train.loop import Run, train
from tercet.types import Example

BASE: Final = "minilm"
DEV_EXAMPLES: Final = 400  # enough to choose by, and quick to measure
QUERIES: Final = (
    "tell me when my laptop battery runs low",
    "turn a folder of photos into a web gallery",
    "find out which process is eating my memory",
)

Say = Callable[[str], None]


def run_demo(out: Path, data: Path, *, steps: int, seed: int, console: Console, say: Say) -> None:
    """Fine-tune MiniLM on Debian package descriptions, compare with itself and BM25, and search.

    Trains on the train split, chooses the best weights on the dev split, and looks at the test
    split twice: before and after.

    Raises:
        DataError: when the package descriptions are not where they should be.
    """
    began = time.monotonic()
    packages = _packages(data)
    for split in ("train", "dev", "test"):
        write_examples(out / "data" / f"{split}.jsonl", _examples(packages, split))
    test = RetrievalSet.from_examples(out / "data/test.jsonl")
    say(f"{len(packages):,} Debian packages: can a one-line description find the full one?")

    say(f"measuring BM25 and {BASE} on the {len(test.queries):,} packages of the test split")
    lexical = measure_bm25(test)
    before = measure(Embedder.load(BASE), test, progress=True)

    source = open_source(out / "data/train.jsonl")
    dev = RetrievalSet.from_examples(_first(_examples(packages, "dev"), DEV_EXAMPLES), "dev")
    recipe = finetune(base=BASE, steps=steps, seed=seed, learning_rate=1e-4, temperature=0.03)
    run = Run(eval_steps=max(1, steps // 3))
    embedder = train(recipe, [source], out, score=dev_score(dev), run=run, say=say)

    say("measuring the trained model on the same test split")
    after = measure(embedder, test, progress=True)
    gain = {m: paired_difference(after.result.scores[m], before.result.scores[m]) for m in METRICS}
    lead = {m: paired_difference(after.result.scores[m], lexical.scores[m]) for m in METRICS}
    results = {
        "BM25": {m: lexical.interval(m) for m in METRICS},
        "before": {m: before.result.interval(m) for m in METRICS},
        "after": {m: after.result.interval(m) for m in METRICS},
    }
    differences = {"after - before": gain, "after - BM25": lead}

    say("indexing the packages of the test split")
    index = _index(out, packages, embedder, after.documents)
    found = index.search(embedder.encode(QUERIES, "query"), 3)

    seconds = time.monotonic() - began
    report = RunReport(
        title="Demo: fine-tuning MiniLM on Debian package descriptions",
        summary=_summary(gain["ndcg@10"], seconds),
        results=results,
        differences=differences,
        scores={"before": _sample(before), "after": _sample(after)},
        searches=[
            ExampleSearch(query, [(hit.title, hit.score) for hit in hits])
            for query, hits in zip(QUERIES, found, strict=True)
        ],
        settings=_settings(recipe, run, source.fingerprint, seconds),
        **_curves(out),
    )
    write_report(out / "report.html", report)
    _last_screen(out, console, results, differences, list(zip(QUERIES, found, strict=True)))


def _packages(data: Path) -> list[dict[str, Any]]:
    if not data.is_file():
        raise DataError(
            data,
            None,
            "no such file; run the demo in a checkout of the repository, "
            "or say with --data where packages.en.parquet is",
        )
    columns = ["id", "short", "long", "split"]
    return pq.read_table(data, columns=columns).to_pylist()


def _examples(packages: Sequence[dict[str, Any]], split: str) -> Iterator[Example]:
    for package in packages:
        if package["split"] == split:
            yield Example(package["short"], (package["long"],), task="debian")


def _first(examples: Iterator[Example], count: int) -> list[Example]:
    return [example for example, _ in zip(examples, range(count), strict=False)]


def _index(
    out: Path, packages: Sequence[dict[str, Any]], embedder: Embedder, vectors: np.ndarray
) -> ExactIndex:
    """The test split's packages, by the vectors that they were measured with."""
    chosen = [package for package in packages if package["split"] == "test"]
    return ExactIndex.build(
        out / "index",
        vectors=vectors,
        documents=((p["id"], f"{p['id']}: {p['short']}", p["long"]) for p in chosen),
        settings={
            "model": str((out / "model").resolve()),
            "fingerprint": embedder.fingerprint(),
            "dims": None,
            "precision": "float32",
        },
    )


def _sample(measured: Measured) -> ScoreSample:
    return ScoreSample(measured.positives.tolist(), measured.negatives.tolist())


def _curves(out: Path) -> dict[str, list[float]]:
    steps = [record for record in log.read(out / "log.jsonl") if "loss" in record]
    return {
        "losses": [record["loss"] for record in steps],
        "learning_rates": [record["learning_rate"] for record in steps],
    }


def _verdict(gain: Interval) -> str:
    if gain.low > 0:
        return f"The gain is real: nDCG@10 {gain.mean:+.3f}, 95 % interval above zero."
    if gain.high < 0:
        return f"The model became worse: nDCG@10 {gain.mean:+.3f}, 95 % interval below zero."
    return f"No gain is shown: nDCG@10 {gain.mean:+.3f}, but the 95 % interval holds zero."


def _summary(gain: Interval, seconds: float) -> list[str]:
    return [
        "all-MiniLM-L6-v2 learned to find a Debian package's full description by its one-line "
        "description. It was trained on the train split, the best weights were chosen on the dev "
        "split, and all numbers here are of the test split, which neither step has seen.",
        f"{_verdict(gain)} Training and measuring took {seconds / 60:.1f} minutes.",
        "It is known-item search with one right document a query, and nearly every query shares "
        "words with its document: BM25 is strong by construction.",
    ]


def _settings(recipe: Any, run: Run, data: str, seconds: float) -> dict[str, str]:
    stage = recipe.stages[0]
    names = ("tercet", "torch", "transformers", "numpy", "bm25s")
    return {
        "base": recipe.model.base,
        "data": f"Debian 12 package descriptions, English; train split, content hash {data[:12]}",
        "seed": str(recipe.seed),
        "budget": f"{stage.steps} steps of {stage.batch_size} examples, {seconds:.0f} s in all",
        "objective": str(stage.objective),
        "learning rate": f"{stage.learning_rate} at its peak, {stage.schedule}",
        "precision": run.precision,
        "dev set": f"the first {DEV_EXAMPLES} examples of the dev split, by nDCG@10",
        "versions": ", ".join(f"{name} {version(name)}" for name in names),
        "python": sys.version.split()[0],
    }


def _last_screen(
    out: Path,
    console: Console,
    results: dict[str, dict[str, Interval]],
    differences: dict[str, dict[str, Interval]],
    searches: Sequence[tuple[str, Sequence[Hit]]],
) -> None:
    for query, hits in searches:
        console.print(f"\n{query}", style="bold", markup=False)
        for hit in hits:
            console.print(f"  {hit.score:.3f}  {hit.title}", markup=False)
    console.print()
    shown = ("ndcg@10", "recall@100", "mrr@10")
    table = Table("test split", *shown, box=None, pad_edge=False, header_style="bold")
    for name, row in results.items():
        table.add_row(name, *(str(row[metric]) for metric in shown))
    for name, row in differences.items():
        gains = [row[metric] for metric in shown]
        table.add_row(name, *(f"{g.mean:+.3f} [{g.low:+.3f}, {g.high:+.3f}]" for g in gains))
    console.print(table)
    tercet = "tercet" if shutil.which("tercet") else f"{Path(sys.executable).parent}/tercet"
    console.print(f"\n{_verdict(differences['after - before']['ndcg@10'])}")
    console.print(
        f"Report: {out}/report.html\n\n"
        "Next, on your own files (one JSON object a line):\n"
        f"  {tercet} check pairs.jsonl\n"
        f"  {tercet} train finetune --data pairs.jsonl --dev dev.jsonl --out runs/mine\n"
        f"  {tercet} eval runs/mine/model test.jsonl --against {BASE}\n"
        f"  {tercet} index runs/mine/model docs.jsonl --out runs/mine/index\n"
        f'  {tercet} search runs/mine/index "your question"',
        markup=False,
        soft_wrap=True,
    )
