"""What each stage and each kind of BGE-M3 brings, on real texts in several languages.

    python -m benchmarks.m3_quality --debian FOLDER --work runs/m3_quality

Runs the commands that a user would give, in order: files of the Debian texts, RetroMAE and
contrastive training of multilingual-e5-small, mining with that model, then the unified stage with
and without self-distillation, and the evaluation of all of them on the test split; MCLS on manual
pages, with a model that pools the first token. What is in the work folder already is not made
again. The unified stage keeps its last weights, whatever a dev set says of them; nothing is chosen
by the test split.

``before`` and ``contrastive`` have heads that nobody trained: the overlap of words, and the
similarity of tokens.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row, settings, write_results
from tercet.kinds import KINDS
from tercet.models.embedder import Embedder

BASE = "me5-small"
SETS = {
    "English, first 1,000": "en-1000.jsonl",
    "Korean": "ko.jsonl",
    "German": "de.jsonl",
    "Japanese": "ja.jsonl",
    "Korean -> English": "ko-en",
    "manual pages, English": "longdocs-en.jsonl",
    "manual pages, Japanese": "longdocs-ja.jsonl",
}
LONG = ("manual pages, English", "manual pages, Japanese")

# Flags of every training; the table of tokens stays as it is, being four fifths of the model.
COMMON = settings(
    "run.dtype=bfloat16 freeze_embeddings=true run.memory_gb=2.5 unified.negatives=2 multi_dim=128 "
    "query_tokens=48"
)
RETROMAE = settings("retromae.steps=40 retromae.batch_size=16 retromae.max_tokens=256")
CONTRASTIVE = settings("document_tokens=128 contrastive.steps=60 contrastive.batch_size=48")
UNIFIED = settings(
    "stages=unified document_tokens=256 unified.steps=80 unified.batch_size=16 "
    "unified.learning_rate=3e-5"
)
MINING = "--rule percent --value 0.95 --negatives 3 --dtype bfloat16".split()


# The unified stage, from the model of the stages before.
RUNS: dict[str, tuple[str, ...]] = {
    "distilled": (),
    "plain": settings("unified.self_distillation=false"),
}


@dataclass(frozen=True)
class Measured:
    """A row of the table: a model, how it is read, and what it is asked."""

    name: str
    model: str  # a folder in the work folder
    flags: tuple[str, ...] = ()
    sets: tuple[str, ...] = tuple(SETS)


MEASURED = (
    Measured("before", "before", ("--bm25",)),
    Measured("contrastive", "contrastive"),
    Measured("unified, self-distillation", "distilled/model"),
    Measured("unified, no self-distillation", "plain/model"),
    Measured("first token", "first/1-contrastive/model", sets=LONG),
    *(
        Measured(f"MCLS every {n}", "first/1-contrastive/model", (f"--cls-every={n}",), LONG)
        for n in (128, 256)
    ),
)


def main() -> None:
    """Make what is missing, then write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--debian", type=Path, required=True, help="packages.LANG.parquet")
    parser.add_argument("--work", type=Path, default=Path("runs/m3_quality"))
    chosen = parser.parse_args()
    work: Path = chosen.work
    if not (work / "data").exists():
        script = Path(__file__).parents[1] / "examples/debian_languages.py"
        _run(str(script), str(work / "data"), "--data", str(chosen.debian), "--rows", "1500")
        lines = (work / "data/test/en.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (work / "data/test/en-1000.jsonl").write_text("".join(lines[:1_000]), encoding="utf-8")
    _train(work)
    write_results("m3_quality", list(_rows(work)))


def _train(work: Path) -> None:
    """Every model that is not there yet."""
    dev = ["--dev", str(work / "data/dev/mixed.jsonl")]
    texts = sorted((work / "data/train").glob("*.jsonl"))
    pairs = [part for path in texts for part in ("--data", str(path))]
    train = ("train", "bge-m3", *COMMON)
    _with_new_heads(BASE, work / "before")
    if not (work / "prepared/2-contrastive/model").exists():
        stages = (*settings("stages=retromae,contrastive"), *RETROMAE, *CONTRASTIVE)
        _tercet(*train, *dev, *pairs, *stages, "--model", BASE, "--out", str(work / "prepared"))
    _with_new_heads(str(work / "prepared/2-contrastive/model"), work / "contrastive")
    if not (work / "first/1-contrastive/model").exists():
        stages = (*settings("stages=contrastive pooling=first"), *CONTRASTIVE)
        _tercet(*train, *dev, *pairs, *stages, "--model", BASE, "--out", str(work / "first"))
    teacher = ("--model", str(work / "prepared/2-contrastive/model"))
    if not (work / "mined").exists():
        kept = ("--work", str(work / "mining"), "--out", str(work / "mined"))
        _tercet("mine", *(str(path) for path in texts), *teacher, *MINING, *kept)
    mined = [part for path in texts for part in ("--data", str(work / "mined" / path.name))]
    for name, flags in RUNS.items():
        if not (work / name / "model").exists():
            where = ("--model", teacher[1], "--out", str(work / name))
            _tercet(*train, *mined, *UNIFIED, *flags, *where)


def _with_new_heads(model: str, folder: Path) -> None:
    """The model with sparse and multi heads as training would begin with them."""
    if not folder.exists():
        torch.manual_seed(0)
        Embedder.load(model, kinds=KINDS, multi_dim=128).save(folder)


def _rows(work: Path) -> Iterator[Row]:
    """A row for each model, set and kind; what is not measured yet is measured first."""
    for measured in MEASURED:
        for title in measured.sets:
            name = SETS[title]
            path = work / "scores" / measured.name / f"{name.removesuffix('.jsonl')}.json"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                how = ("--dtype", "bfloat16", "--document-tokens", "512")
                flags = (
                    measured.flags if "--bm25" in measured.flags else (*measured.flags, "--no-bm25")
                )
                asked = (str(work / "data/test" / name), "--model", str(work / measured.model))
                _tercet("eval", *asked, *how, *flags, "--json", str(path))
            yield from _rows_of(measured, title, json.loads(path.read_text(encoding="utf-8")))


def _rows_of(measured: Measured, title: str, said: dict[str, Any]) -> Iterator[Row]:
    """Of one file of scores: each system, and how much better it is than the dense vectors."""
    (_, less) = next(iter(said["differences"].items()), ("", {}))
    for system, found in said["results"].items():
        kind = system.rsplit(" ", 1)[-1]  # of a model with one kind: the model itself
        name = kind if kind.split("+")[0] in KINDS else "dense"
        name = system if system.startswith("BM25") else name
        over = less.get(system) if isinstance(less, dict) else None
        yield {
            "name": f"{measured.name}: {title}",
            "system": name.split(", tokens of")[0] + (", tokens" if ", tokens of" in name else ""),
            "set": said["what"],
            **{metric: _interval(found[metric]) for metric in ("ndcg@10", "recall@100")},
            "ndcg@10 - dense": _interval(over["ndcg@10"]) if over else None,
        }


def _interval(said: dict[str, Any]) -> list[float]:
    """Mean, and the 95 % interval of the bootstrap."""
    return [round(said[part], 4) for part in ("mean", "low", "high")]


def _tercet(*arguments: str) -> None:
    _run("-m", "tercet", *arguments)


def _run(*arguments: str) -> None:
    print("python", *arguments, flush=True)
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    main()
