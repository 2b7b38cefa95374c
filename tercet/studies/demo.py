"""The whole job on real texts in a few minutes: train, measure honestly, search, report."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from tercet.data.files.sources import Source, open_source, write_examples
from tercet.errors import DataError
from tercet.evaluate.measures.by_kind import dev_score
from tercet.evaluate.measures.retrieval import Measured, RetrievalResult, measure, measure_bm25
from tercet.evaluate.report.charts import Html, histogram, interval_chart
from tercet.evaluate.report.intervals import Interval, paired_difference
from tercet.evaluate.report.page import (
    Page,
    Section,
    facts,
    figure,
    interval_table,
    ranked,
    side_by_side,
    write_page,
)
from tercet.evaluate.sets.retrieval_set import METRICS, RetrievalSet
from tercet.files.outputs import check_output, mark
from tercet.models.devices import NumberType, find_device
from tercet.models.embedder import Embedder
from tercet.models.fastest import fastest_type
from tercet.recipes.finetune import finetune
from tercet.search.engine.engine import Hit, Record
from tercet.search.indexing import settings_of
from tercet.search.opening import About, make_engine, write_about
from tercet.training import log
from tercet.training.loop import train
from tercet.training.plan import RUN
from tercet.training.recipe import Recipe, Run
from tercet.training.run_report import stage_charts
from tercet.types import Example
from tercet.vectors import Vectors

BASE: Final = "minilm"
DEV_EXAMPLES: Final = 400  # enough to choose by, and quick to measure
SMALLEST_SECTION: Final = 32  # packages; a smaller one makes no batch
QUERIES: Final = (
    "tell me when my laptop battery runs low",
    "turn a folder of photos into a web gallery",
    "find out which process is eating my memory",
)

Say = Callable[[str], None]


def run_demo(out: Path, data: Path, *, steps: int, seed: int, console: Console, say: Say) -> None:
    """Fine-tune MiniLM on Debian package descriptions, compare with itself and BM25, and search.

    Trains on the train split, chooses the best weights on the dev split, and looks at the test
    split twice: before and after. Every section of the archive is a separate source and a batch
    holds one source, so the model learns to distinguish a web server from other web servers.

    Raises:
        DataError: when the package descriptions are not where they should be.
    """
    began = time.monotonic()
    check_output(out, [data], RUN)
    packages = _packages(data)
    mark(out, RUN)
    say(f"{len(packages):,} Debian packages: can a one-line description find the full one?")
    paths = _write_data(out / "data", packages)
    test = RetrievalSet.from_examples(out / "data/test.jsonl")
    say(f"measuring BM25 and {BASE} on the {len(test.queries):,} packages of the test split")
    lexical = measure_bm25(test)
    device = find_device(None)
    dtype = fastest_type(BASE, device, say)
    before = measure(_loaded(BASE, dtype, device), test, progress=True)

    sources = [open_source(path) for path in paths]
    dev = RetrievalSet.from_examples(_first(_examples(packages, "dev"), DEV_EXAMPLES), "dev")
    recipe = finetune(model=BASE, steps=steps, seed=seed, learning_rate=1e-4, temperature=0.03)
    run = Run(dtype=dtype, eval_steps=max(1, steps // 2)).resolved()
    train(recipe, sources, out, score=dev_score(dev), run=run, say=say)
    embedder = _loaded(str(out / "model"), dtype, device)

    say("measuring the trained model on the same test split")
    after = measure(embedder, test, progress=True)
    found = _search(out, packages, embedder, after.documents, dtype)
    comparison = _compare(before, after, lexical)
    seconds = time.monotonic() - began
    page = Page(
        "Demo: fine-tuning MiniLM on Debian package descriptions",
        _summary(comparison.gain, seconds),
        [
            Section("Results", _results(comparison)),
            Section("Training", stage_charts(log.read(out / log.LOG))),
            Section("Scores of relevant and other documents", [_scores(before, after)]),
            Section(
                "Example searches",
                [ranked(q, [(hit.record.title, hit.score) for hit in hits]) for q, hits in found],
            ),
            Section("Settings", [facts(_settings(recipe, run, sources, seconds))]),
        ],
    )
    write_page(out / "report.html", page)
    _last_screen(out, console, comparison, found)


def _loaded(model: str, dtype: NumberType, device: torch.device) -> Embedder:
    return Embedder.load(model, dtype=getattr(torch, dtype)).to(device)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Metrics of each system, and of the trained model's lead over the others."""

    results: dict[str, dict[str, Interval]]
    differences: dict[str, dict[str, Interval]]

    @property
    def gain(self) -> Interval:
        return self.differences["after - before"]["ndcg@10"]


def _compare(before: Measured, after: Measured, lexical: RetrievalResult) -> _Comparison:
    systems = {"BM25": lexical, "before": before.result, "after": after.result}
    leads = {"after - before": before.result, "after - BM25": lexical}
    return _Comparison(
        {name: {m: result.interval(m) for m in METRICS} for name, result in systems.items()},
        {
            name: {m: paired_difference(after.result.scores[m], other.scores[m]) for m in METRICS}
            for name, other in leads.items()
        },
    )


def _write_data(folder: Path, packages: Sequence[dict[str, Any]]) -> list[Path]:
    """The three splits as a user's files would be; the train split has a file a section."""
    for split in ("dev", "test"):
        write_examples(folder / f"{split}.jsonl", _examples(packages, split))
    sections: dict[str, list[dict[str, Any]]] = {}
    for package in packages:
        if package["split"] == "train":
            sections.setdefault(package["section"].replace("/", "-"), []).append(package)
    paths = []
    for section, members in sorted(sections.items()):
        if len(members) >= SMALLEST_SECTION:
            paths.append(folder / "train" / f"{section}.jsonl")
            write_examples(paths[-1], _examples(members, "train"))
    return paths


def _packages(data: Path) -> list[dict[str, Any]]:
    if not data.is_file():
        raise DataError(
            data,
            None,
            "no such file; run the demo in a checkout of the repository, "
            "or say with --packages where packages.en.parquet is",
        )
    columns = ["id", "short", "long", "section", "split"]
    return pq.read_table(data, columns=columns).to_pylist()


def _examples(packages: Sequence[dict[str, Any]], split: str) -> Iterator[Example]:
    for package in packages:
        if package["split"] == split:
            yield Example(package["short"], (package["long"],), task="debian")


def _first(examples: Iterator[Example], count: int) -> list[Example]:
    return [example for example, _ in zip(examples, range(count), strict=False)]


def _search(
    out: Path,
    packages: Sequence[dict[str, Any]],
    embedder: Embedder,
    vectors: np.ndarray,
    dtype: NumberType,
) -> list[tuple[str, list[Hit]]]:
    """Index the test split by the vectors that it was measured with, and ask three questions."""
    chosen = [package for package in packages if package["split"] == "test"]
    records = [
        Record(p["id"], p["long"], f"{p['id']}: {p['short']}", {"section": p["section"]})
        for p in chosen
    ]
    model = str((out / "model").resolve())
    settings = settings_of(embedder, model=model, kinds=("dense",), precision=dtype)
    about = About(settings=settings)
    with closing(make_engine(out / "index", about, fresh=True)) as engine:
        engine.upsert(records, Vectors(dense=torch.from_numpy(vectors)))
        engine.flush()
        queries = embedder.encode_vectors(QUERIES, "query", kinds=("dense",))
        found = engine.search(queries, 3)
    write_about(out / "index", about)
    return list(zip(QUERIES, found, strict=True))


def _results(compared: _Comparison) -> list[Html]:
    metric = METRICS[0]
    rows = {name: {name: row[metric]} for name, row in compared.results.items()}
    drawing = interval_chart(rows, name=metric, baselines=("BM25", "before"))
    caption = (
        f"{metric} and its 95 % interval. Overlapping intervals do not show equality: see the "
        "differences query by query."
    )
    return [
        figure(drawing, caption),
        interval_table("system", compared.results),
        interval_table("difference, query by query", compared.differences, signed=True),
    ]


def _scores(before: Measured, after: Measured) -> Html:
    every = np.concatenate([x for one in (before, after) for x in (one.positives, one.negatives)])
    reach = (float(every.min()), float(every.max()))
    charts = (
        histogram(
            {"relevant": each.positives.tolist(), "other": each.negatives.tolist()},
            name=f"scores {when} training",
            x=f"score {when} training",
            reach=reach,
        )
        for when, each in (("before", before), ("after", after))
    )
    return figure(
        side_by_side(charts),
        "Scores of queries with the documents that answer them, and with other documents. The less "
        "the two histograms overlap, the better.",
    )


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


def _settings(
    recipe: Recipe, run: Run, sources: Sequence[Source], seconds: float
) -> dict[str, str]:
    stage = recipe.stages[0]
    examples = sum(len(source) for source in sources)
    names = ("tercet", "torch", "transformers", "numpy", "bm25s")
    return {
        "base": recipe.model.base,
        "data": f"Debian 12 package descriptions, English; train split: {examples:,} examples in "
        f"{len(sources)} sections, one section a batch",
        "seed": str(recipe.seed),
        "budget": f"{stage.steps} steps of {stage.batch_size} examples, {seconds:.0f} s in all",
        "objective": str(stage.objective),
        "learning rate": f"{stage.learning_rate} at its peak, {stage.schedule}",
        "dtype": run.dtype or "float32",
        "dev set": f"the first {DEV_EXAMPLES} examples of the dev split, by nDCG@10",
        "versions": ", ".join(f"{name} {version(name)}" for name in names),
        "python": sys.version.split()[0],
    }


def _last_screen(
    out: Path, console: Console, compared: _Comparison, found: Sequence[tuple[str, list[Hit]]]
) -> None:
    for query, hits in found:
        console.print(f"\n{query}", style="bold", markup=False)
        for hit in hits:
            console.print(f"  {hit.score:.3f}  {hit.record.title}", markup=False)
    console.print()
    shown = ("ndcg@10", "recall@100", "mrr@10")
    table = Table("test split", *shown, box=None, pad_edge=False, header_style="bold")
    for name, row in compared.results.items():
        table.add_row(name, *(str(row[metric]) for metric in shown))
    for name, row in compared.differences.items():
        gains = [row[metric] for metric in shown]
        table.add_row(name, *(f"{g.mean:+.3f} [{g.low:+.3f}, {g.high:+.3f}]" for g in gains))
    console.print(table)
    tercet = "tercet" if shutil.which("tercet") else f"{Path(sys.executable).parent}/tercet"
    console.print(f"\n{_verdict(compared.gain)}")
    console.print(
        f"Report: {out}/report.html\n\n"
        "Next, on your own files (one JSON object a line):\n"
        f"  {tercet} check pairs.jsonl\n"
        f"  {tercet} train finetune --data pairs.jsonl --dev dev.jsonl --out runs/mine\n"
        f"  {tercet} eval test.jsonl --model runs/mine/model --compare-with {BASE}\n"
        f"  {tercet} index docs.jsonl --model runs/mine/model --out runs/mine/index\n"
        f'  {tercet} search runs/mine/index "your question"\n\n'
        "Search these packages in a browser, and from clients of OpenAI, Cohere and TEI:\n"
        f"  {tercet} serve --index {out}/index",
        markup=False,
        soft_wrap=True,
    )
