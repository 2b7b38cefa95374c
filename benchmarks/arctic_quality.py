"""What each part of Arctic-Embed 2.0 brings, on real texts in 11 languages.

    python -m benchmarks.arctic_quality --debian FOLDER --work runs/arctic_quality

Runs the commands that a user would give, in order: files of the Debian texts, of which a fifth of
the pairs get the document of another package; `tercet filter` with multilingual-e5-small; its
contrastive pretraining on what was kept and on everything; `tercet mine` with the pretrained model,
with and without a rule that looks at the positive; fine-tuning on random negatives and on both
kinds of mined ones; and the evaluation of all of them on the test split, whole and cut to 256
coordinates, in float32 and in small codes. What is in the work folder already is not made again.
Nothing is chosen by the test split.
"""

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Row, settings, write_results
from tercet.data.files.sources import iter_examples, write_examples
from tercet.evaluate.measures.retention import STORED, retention
from tercet.evaluate.report.intervals import interval, paired_difference
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.models.embedder import Embedder
from tercet.types import Example

BASE = "me5-small"
LANGUAGES = ("en", "da", "de", "es", "fr", "it", "ja", "ko", "pt_BR", "ru", "zh_CN")
SEED = 0
WRONG = 0.2  # share of the pairs whose document is that of another package
TESTED = 1_000  # English queries at most, and documents; of the others 200
METRIC = "ndcg@10"
LEVELS = (1, 2, 3, 5, 10, 20, 30)

# Flags of every training; the table of tokens stays as it is, being four fifths of the model.
COMMON = settings(
    "freeze_embeddings=true run.memory_gb=2.5 seed=0 pretraining.query_tokens=32 "
    "pretraining.document_tokens=64 finetuning.max_tokens=64"
)
PRETRAINING = settings(
    "stages=pretraining pretraining.steps=40 pretraining.batch_size=96 "
    "pretraining.learning_rate=5e-5"
)
FINETUNING = settings(
    "stages=finetuning finetuning.steps=15 finetuning.batch_size=24 finetuning.negatives=3 "
    "finetuning.learning_rate=2e-5"
)
THRESHOLDS = (0.9, 0.95, 0.98, 0.99, 1.0)
AWARE = ("--rule", "percent", "--value", "0.98")
MODELS = {  # as the table names them: their folder in the work folder
    "base": BASE,
    "pretrained, unfiltered": "pre-unfiltered/model",
    "pretrained": "pre/model",
    "+ random negatives": "ft-random/model",
    "+ nearest negatives": "ft-nearest/model",
    "+ positive-aware negatives": "ft-aware/model",
}
LAST = "+ positive-aware negatives"
COMPARED = (  # over the queries of all languages
    ("pretrained", "base"),
    ("pretrained", "pretrained, unfiltered"),
    (LAST, "pretrained"),
    (LAST, "+ random negatives"),
    (LAST, "+ nearest negatives"),
)


def main() -> None:
    """Make what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--debian", type=Path, required=True, help="packages.LANG.parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/arctic_quality"))
    parser.add_argument("--until", choices=("data", "unfiltered", "pre", "all"), default="all")
    chosen = parser.parse_args()
    work: Path = chosen.work
    torch.set_num_threads(1)
    _make(work / "data", lambda: _data(chosen.debian, work / "data"))
    _make(work / "sources", lambda: _inject(work / "data/train", work / "sources"))
    if chosen.until == "data":
        return
    raw = [part for path in _files(work / "sources") for part in ("--data", path)]
    _train(work / "pre-unfiltered", BASE, *PRETRAINING, *raw)
    if chosen.until == "unfiltered":
        return
    filtered = work / "filtered"
    _make(filtered / "report.json", lambda: _filter(work / "sources", filtered, work))
    kept = ("--data", str(filtered / "pairs"))
    _train(work / "pre", BASE, *PRETRAINING, *kept)
    if chosen.until == "pre":
        return
    _mine_all(work)
    for kind in ("random", "nearest", "aware"):
        mined = [part for path in _files(work / f"mined-{kind}") for part in ("--data", path)]
        _train(work / f"ft-{kind}", str(work / "pre/model"), *FINETUNING, *mined)
    rows = [*_filter_rows(work), *_sweep_rows(work), *_quality_rows(work)]
    rows += [*_paired_rows(work), *_size_rows(work)]
    write_results("arctic_quality", rows)


def _data(debian: Path, out: Path) -> None:
    """Files by language; English with more test queries than the others."""
    script = Path(__file__).parents[1] / "examples/debian_languages.py"
    sizes = ("--rows", "1200", "--dev-rows", "50", "--test-rows", str(TESTED))
    _run(str(script), str(out), "--data", str(debian), "--all", *sizes)
    for lang in LANGUAGES[1:]:
        path = out / f"test/{lang}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[:200]), encoding="utf-8")


def _inject(train: Path, out: Path) -> None:
    """Give a fifth of the rows of each language the document of another such row."""
    for lang in LANGUAGES:
        rows = list(iter_examples(train / f"{lang}.jsonl", lang))
        drawn = random.Random(f"{SEED} {lang}")
        wrong = drawn.sample(range(len(rows)), round(WRONG * len(rows)))
        documents = [rows[row].positives for row in wrong]
        changed = dict(zip(wrong, [*documents[1:], documents[0]], strict=True))
        examples = [
            Example(row.query, changed.get(number, row.positives), task=lang, lang=lang)
            for number, row in enumerate(rows)
        ]
        write_examples(out / f"{lang}.jsonl", examples)
        (out / f"{lang}.wrong.json").write_text(json.dumps(sorted(wrong)), encoding="utf-8")


def _filter(sources: Path, out: Path, work: Path) -> None:
    flags = ("--model", BASE, "--work", str(work / "filtering"))
    _tercet("filter", *_files(sources), "--out", str(out), *flags, *FILTER)


FILTER = ("--query-tokens", "32", "--document-tokens", "64")


def _mine_all(work: Path) -> None:
    """Rows with negatives of three kinds, of the pairs that the filter kept."""
    pairs = work / "pairs"
    _make(pairs, lambda: _kept_by_language(work / "filtered/pairs", pairs))
    files = _files(pairs)
    how = ("--model", str(work / "pre/model"), "--negatives", "3")
    how += ("--work", str(work / "mining"))
    _make(
        work / "mined-nearest",
        lambda: _tercet(
            "mine", *files, *how, "--rule", "naive", "--out", str(work / "mined-nearest")
        ),
    )
    _make(
        work / "mined-aware",
        lambda: _tercet("mine", *files, *how, *AWARE, "--out", str(work / "mined-aware")),
    )
    _make(work / "mined-random", lambda: _random(pairs, work / "mined-random"))


def _kept_by_language(filtered: Path, out: Path) -> None:
    """The pairs that were kept, a file a language."""
    rows: dict[str, list[Example]] = {lang: [] for lang in LANGUAGES}
    for path in sorted(filtered.rglob("*.parquet")):
        for example in iter_examples(path):
            rows[example.lang].append(example)
    for lang, examples in rows.items():
        write_examples(out / f"{lang}.jsonl", examples)


def _random(pairs: Path, out: Path) -> None:
    """Three documents of other packages in the same language for each query."""
    for path in map(Path, _files(pairs)):
        rows = list(iter_examples(path))
        drawn = random.Random(f"{SEED} {path.stem}")
        written = []
        for row in rows:
            others = [other.positives[0] for other in drawn.sample(rows, 5)]
            negatives = [text for text in dict.fromkeys(others) if text not in row.positives][:3]
            written.append(
                Example(row.query, row.positives, tuple(negatives), task=row.task, lang=row.lang)
            )
        write_examples(out / path.name, written)


def _filter_rows(work: Path) -> Iterator[Row]:
    """How many of the wrong pairs each level of the filter finds, and what it costs."""
    verdicts = _verdicts(work / "filtered")
    for level in (*LEVELS, None):
        found = dropped = wrong = right = 0
        for lang in LANGUAGES:
            bad = set(json.loads((work / f"sources/{lang}.wrong.json").read_text()))
            for row, (keep, rank) in verdicts[lang].items():
                out = (rank == 0 or rank > level) if level else not keep
                wrong, right = wrong + (row in bad), right + (row not in bad)
                found, dropped = found + (out and row in bad), dropped + (out and row not in bad)
        yield {
            "name": "filter: as used" if level is None else f"filter: rank {level}",
            "wrong pairs": wrong,
            "found": found / wrong,
            "right pairs": right,
            "right pairs dropped": dropped / right,
        }


def _verdicts(filtered: Path) -> dict[str, dict[int, tuple[bool, int]]]:
    """Of each language and row: whether it was kept, and its rank; 0: dropped by a rule before."""
    import pyarrow.parquet as pq

    found: dict[str, dict[int, tuple[bool, int]]] = {lang: {} for lang in LANGUAGES}
    for path in sorted((filtered / "verdicts").rglob("*.parquet")):
        lang = next(
            lang for lang in LANGUAGES if lang in str(path.relative_to(filtered)).split("/")
        )
        for row in pq.read_table(path).to_pylist():
            found[lang][row["row"]] = (row["keep"], row["rank"] or 0)
    return found


def _sweep_rows(work: Path) -> Iterator[Row]:
    """What each threshold of the positive-aware rule leaves of the candidates."""
    path = work / "sweep.json"
    if not path.exists():
        from tercet.curate.mining.miner import Mining, sweep
        from tercet.curate.mining.rules import MiningRule
        from tercet.data.files.sources import open_source

        teacher = Embedder.load(str(work / "pre/model"))
        reports = sweep(
            teacher,
            [open_source(file) for file in _files(work / "pairs")],
            THRESHOLDS,
            mining=Mining(rule=MiningRule(kind="percent", value=0.95), negatives=3),
            work=work / "mining",
        )
        totals: dict[float, dict[str, float]] = {}
        for report in reports:
            total = totals.setdefault(float(report.rule.used_value), dict.fromkeys(_SWEPT, 0.0))
            total["rows"] += report.rows
            total["candidates"] += report.candidates
            total["too close"] += report.dropped["too close"]
            total["negatives"] += report.negatives
            total["short"] += report.short
            total["positive score"] += report.positive_total
            total["negative score"] += report.negative_total
        path.write_text(json.dumps(list(totals.items())), encoding="utf-8")
    for value, total in json.loads(path.read_text(encoding="utf-8")):
        yield {
            "name": f"mining: percent {value}",
            "rows": int(total["rows"]),
            "dropped as too close": total["too close"] / total["candidates"],
            "negatives a row": total["negatives"] / total["rows"],
            "rows short of 3": total["short"] / total["rows"],
            "mean positive score": total["positive score"] / total["rows"],
            "mean negative score": total["negative score"] / max(total["negatives"], 1),
        }


_SWEPT = ("rows", "candidates", "too close", "negatives", "short")
_SWEPT += ("positive score", "negative score")


def _scores(work: Path, model: str, lang: str, split: str) -> dict[str, np.ndarray]:
    """nDCG@10 of each query, by width and form of the documents' vectors; measured once."""
    folder = MODELS[model]
    path = work / "scores" / folder.replace("/", "-") / f"{split}-{lang}.npz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        name = folder if folder == BASE else str(work / folder)
        embedder = Embedder.load(name, query_tokens=48, document_tokens=96)
        data = RetrievalSet.from_examples(work / f"data/{split}/{lang}.jsonl")
        stored = STORED if model in (LAST, "base") else ("float32",)
        found = retention(embedder, data, dims=(256,), stored=stored, names=(METRIC,))
        scores: dict[str, Any] = {each.name: each.result.scores[METRIC] for each in found}
        np.savez(path, **scores)
    with np.load(path) as opened:
        return {name: opened[name] for name in opened.files}


def _quality_rows(work: Path) -> Iterator[Row]:
    """A row for each model and language, then the means over languages, whole and cut."""
    for model in MODELS:
        means: dict[str, list[float]] = {"384 float32": [], "256 float32": []}
        against: list[np.ndarray] = []
        for lang in LANGUAGES:
            found, base = (_scores(work, name, lang, "test") for name in (model, "base"))
            for name, values in means.items():
                values.append(float(found[name].mean()))
            change = found["384 float32"] - base["384 float32"]
            against.append(change)
            row: Row = {
                "name": f"{model}: {lang}",
                "queries": len(change),
                METRIC: _told(asdict(interval(found["384 float32"], seed=SEED))),
                "256": _told(asdict(interval(found["256 float32"], seed=SEED))),
            }
            if model != "base":
                kept = paired_difference(found["384 float32"], base["384 float32"], seed=SEED)
                row["minus base"] = _told(asdict(kept))
            if model.startswith("+"):
                before = _scores(work, "pretrained", lang, "test")["384 float32"]
                gained = paired_difference(found["384 float32"], before, seed=SEED)
                row["minus pretrained"] = _told(asdict(gained))
            yield row
        yield {
            "name": f"{model}: mean of {len(LANGUAGES)} languages",
            "queries": sum(map(len, against)),
            METRIC: float(np.mean(means["384 float32"])),
            "256": float(np.mean(means["256 float32"])),
            "worst language": LANGUAGES[int(np.argmin(means["384 float32"]))],
        }


def _paired_rows(work: Path) -> Iterator[Row]:
    """What a step brings, over the queries of all languages."""
    for after, before in COMPARED:
        ours, theirs = (
            np.concatenate([_scores(work, name, lang, "test")["384 float32"] for lang in LANGUAGES])
            for name in (after, before)
        )
        gained = paired_difference(ours, theirs, seed=SEED)
        yield {
            "name": f"all languages: {after} minus {before}",
            "queries": len(ours),
            METRIC: _told(asdict(gained)),
        }


def _size_rows(work: Path) -> Iterator[Row]:
    """What documents in few bytes keep, over the queries of all languages."""
    for model in ("base", LAST):
        by_form: dict[str, list[np.ndarray]] = {}
        for lang in LANGUAGES:
            for name, values in _scores(work, model, lang, "test").items():
                by_form.setdefault(name, []).append(values)
        joined = {name: np.concatenate(values) for name, values in by_form.items()}
        for name, values in joined.items():
            loss = paired_difference(values, joined["384 float32"], seed=SEED)
            yield {
                "name": f"sizes, {model}: {name}",
                "queries": len(values),
                METRIC: _told(asdict(interval(values, seed=SEED))),
                "minus 384 float32": _told(asdict(loss)),
            }


def _told(said: dict[str, Any]) -> list[float]:
    """Mean, and the 95 % interval of the bootstrap."""
    return [round(said[part], 4) for part in ("mean", "low", "high")]


def _files(folder: Path) -> list[str]:
    return [str(folder / f"{lang}.jsonl") for lang in LANGUAGES]


def _make(path: Path, make: Callable[[], None]) -> None:
    """Make what is not there; a folder is there when it was finished."""
    done = path if path.suffix else path.with_name(f"{path.name}.done")
    if not done.exists():
        make()
        if done != path:
            done.touch()


def _train(out: Path, base: str, *flags: str) -> None:
    """Train, unless the model is there; a killed training goes on."""
    if not (out / "model").exists():
        _tercet("train", "arctic-embed", "--model", base, "--out", str(out), *COMMON, *flags)


def _tercet(*arguments: str) -> None:
    _run("-m", "tercet", *arguments)


def _run(*arguments: str) -> None:
    print("python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    main()
