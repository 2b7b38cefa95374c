"""Five tasks made of Debian's package descriptions: data to train on, and sets to measure with.

    python -m examples.debian_tasks OUT

writes OUT/train, OUT/dev and OUT/test, and prints the commands that make training rows of them.
Everything under train is of the train split and everything that is measured is of the test split.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from examples.similarity_sets import debtags_similarity
from tercet.data.files.examples import as_object
from tercet.data.files.similarity import SimilaritySet
from tercet.data.files.sources import write_examples
from tercet.data.files.texts import normal_form
from tercet.files.atomic import replacing_file
from tercet.files.console import columns, results
from tercet.files.records import iter_records
from tercet.models.settings import as_prompt
from tercet.types import Example

# What a model is told to do; a file of a task bears its name, and so does what it is tested with.
INSTRUCTIONS: Final = {
    "retrieval": "Given one line about a software package, find its full description",
    "sections": "Tell which section of the archive a software package belongs to",
    "uses": "Tell what a software package is used for",
    "similarity": "Find software packages that are about the same subject",
}
CONVERSIONS: Final = {  # command and options of tercet convert
    "sections": "labels --mode example",
    "uses": "labels --mode example",
    "similarity": "scores",
}
LEAST_ROWS: Final = 100  # of a label, in the train split
LEAST_RELEVANT: Final = 3  # of a topic, in the test split
TOP_SCORE: Final = 5.0  # of two texts that are alike, as in STS Benchmark
TRAIN_PAIRS: Final = 10_000
LEARNED: Final = 4_000  # train texts that the classifier of an evaluation learns from

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Packages:
    """Rows of one split, in their order, which is random."""

    rows: list[Row]
    limit: int | None

    def some(self, rows: Iterable[Row], most: int | None = None) -> list[Row]:
        """The first of these rows, as many as are wanted."""
        return list(rows)[: min((it for it in (self.limit, most) if it is not None), default=None)]


def main(words: list[str] | None = None) -> None:
    """Write all files, check that none of them leaks, and say what to do with them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--limit", type=int, help="rows a file, for a small run")
    asked = parser.parse_args(words)
    packages = asked.data / "packages.en.parquet"
    table = pq.read_table(packages).to_pylist()
    train, dev, test = (
        Packages([row for row in table if row["split"] == split], asked.limit)
        for split in ("train", "dev", "test")
    )
    written = {
        **write_training(asked.out / "train", train, packages),
        **write_retrieval(asked.out / "dev", dev),
        **write_tests(asked.out / "test", train, test, asked.data),
    }
    refuse_leaks(asked.out)
    shown = columns("file", "rows")
    for path, rows in written.items():
        shown.add_row(str(path), str(rows))
    results().print(shown)
    for line in commands(asked.out):
        results().print(line, soft_wrap=True)


def write_training(out: Path, train: Packages, packages: Path) -> dict[Path, int]:
    """One file a task: examples of retrieval, labelled texts, and pairs with a score."""
    sections, uses = frequent(train, section_of), frequent(train, uses_of)
    labelled = [row for row in train.rows if set(uses_of(row)) & uses]
    pairs = debtags_similarity(packages, "train", pairs=train.limit or TRAIN_PAIRS)
    return {
        **write_retrieval(out, train),
        **write_lines(
            out / "sections.jsonl",
            (
                {"text": row["short"], "label": row["section"]}
                for row in train.some(row for row in train.rows if row["section"] in sections)
            ),
        ),
        **write_lines(
            out / "uses.jsonl",
            (
                {"text": row["long"], "labels": [use for use in uses_of(row) if use in uses]}
                for row in train.some(labelled)
            ),
        ),
        **write_lines(out / "similarity.jsonl", scored(pairs)),
    }


def write_tests(out: Path, train: Packages, test: Packages, data: Path) -> dict[Path, int]:
    """What a model is measured with; labels are those that are frequent in the train split."""
    sections, uses = frequent(train, section_of), frequent(train, uses_of)
    learned = train.some((row for row in train.rows if row["section"] in sections), LEARNED)
    asked = test.some(row for row in test.rows if row["section"] in sections)
    one_use = [row for row in test.rows if len(set(uses_of(row)) & uses) == 1]
    pairs = debtags_similarity(data / "packages.en.parquet", pairs=test.limit or 2_000)
    return {
        **write_retrieval(out, test),
        **write_topics(out / "topics", test, data / "topics.parquet"),
        **write_lines(
            out / "sections.jsonl",
            (
                {"text": row["short"], "label": row["section"], "split": row["split"]}
                for row in (*learned, *asked)
            ),
        ),
        **write_lines(
            out / "uses.jsonl",
            (
                {"text": row["long"], "label": (set(uses_of(row)) & uses).pop()}
                for row in test.some(one_use)
            ),
        ),
        **write_lines(out / "similarity.jsonl", scored(pairs)),
    }


def write_retrieval(out: Path, part: Packages) -> dict[Path, int]:
    """From the line about a package to its description."""
    prompt = as_prompt(INSTRUCTIONS["retrieval"])
    rows = part.some(part.rows)
    out.mkdir(parents=True, exist_ok=True)
    write_examples(
        out / "retrieval.jsonl",
        (
            Example(row["short"], (row["long"],), query_prompt=prompt, task="retrieval")
            for row in rows
        ),
    )
    return {out / "retrieval.jsonl": len(rows)}


def write_topics(out: Path, test: Packages, topics: Path) -> dict[Path, int]:
    """From a topic in words to the packages that people gave it, in BEIR's layout."""
    documents = {row["id"]: row["long"] for row in test.some(r for r in test.rows if r["tags"])}
    queries, judged = [], ["query-id\tcorpus-id\tscore"]
    for topic in pq.read_table(topics).to_pylist():
        relevant = [name for name in topic["relevant"] if name in documents]
        if topic["topical"] and len(relevant) >= LEAST_RELEVANT:
            queries.append({"_id": topic["id"], "text": topic["query"]})
            judged += [f"{topic['id']}\t{name}\t1" for name in relevant]
    corpus = ({"_id": name, "text": text} for name, text in documents.items())
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    with replacing_file(out / "qrels/test.tsv") as unfinished:
        unfinished.write_text("\n".join(judged) + "\n", encoding="utf-8")
    return {
        **write_lines(out / "corpus.jsonl", corpus),
        **write_lines(out / "queries.jsonl", queries),
    }


def write_lines(path: Path, records: Iterable[Row]) -> dict[Path, int]:
    """Write a line of JSON a record; the file appears when it is complete."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(path) as unfinished:
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {path: len(lines)}


def scored(pairs: SimilaritySet) -> Iterator[Row]:
    """Pairs of lines, with the overlap of their tags as a score from 0 to 5."""
    for (first, second), score in zip(pairs.pairs, pairs.scores, strict=True):
        texts = {"text1": pairs.texts[first], "text2": pairs.texts[second]}
        yield {**texts, "score": round(TOP_SCORE * score, 3)}


def frequent(part: Packages, labels_of: Any) -> frozenset[str]:
    """Labels that have enough rows to be learned."""
    times = Counter(label for row in part.rows for label in labels_of(row))
    return frozenset(label for label, count in times.items() if count >= LEAST_ROWS)


def section_of(row: Row) -> list[str]:
    """Its section."""
    return [row["section"]]


def uses_of(row: Row) -> list[str]:
    """What people said that it is used for."""
    tags = [tag.partition("::") for tag in row["tags"] or ()]
    return [value for facet, _, value in tags if facet == "use" and value != "TODO"]


def refuse_leaks(out: Path) -> None:
    """Stop where a text that is measured stands in the training data too."""
    learned = {
        normal_form(text) for path in (out / "train").glob("*.jsonl") for text in texts_of(path)
    }
    for path in sorted((out / "test").rglob("*.jsonl")):
        for text in texts_of(path):
            if normal_form(text) in learned:
                raise SystemExit(f"{path}: {text!r} is in the training data too")


def texts_of(path: Path) -> Iterator[str]:
    """All texts of a file; of an evaluation's own train rows, none."""
    for found in iter_records(path, (), needs=()):
        record = as_object(found.value)
        if record.get("split") != "train":
            one = (record[name] for name in ("text", "text1", "text2", "query") if name in record)
            yield from (*one, *record.get("positives", ()))


def commands(out: Path) -> Iterator[str]:
    """How to make training rows of the files; those of retrieval are rows already."""
    for task, how in CONVERSIONS.items():
        command, _, flags = how.partition(" ")
        name = f"{task}.jsonl"
        yield (
            f"tercet convert {command} {out / 'train' / name} {flags} --task {task} "
            f'--instruction "{INSTRUCTIONS[task]}" --out {out / "rows" / name}'
        ).replace("  ", " ")


if __name__ == "__main__":
    main()
