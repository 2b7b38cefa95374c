"""Descriptions of packages in several languages, and long manual pages: data of many tongues.

    python examples/debian_languages.py OUT --data FOLDER

writes OUT/train, OUT/dev and OUT/test from the files packages.LANG.parquet and
longdocs.LANG.parquet of FOLDER. A query is the line about a package, its document the description:
in one language (de.jsonl), or the line in one and the description in English (ko-en.jsonl, and for
the test a folder in BEIR's layout, since English has more documents than there are queries).
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from tercet.console import columns, results
from tercet.data.sources import write_examples
from tercet.data.texts import normal_form
from tercet.files import replacing_file
from tercet.types import Example

Row = dict[str, Any]
LANGUAGES: Final = ("en", "ko", "de", "ja")
FROM: Final = ("ko", "ja", "de")  # queries in these, documents in English
LONG: Final = ("en", "ja")


def main(words: list[str] | None = None) -> None:
    """Write all files, check that none of them leaks, and say how large they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2_000, help="training rows a file")
    parser.add_argument("--dev-rows", type=int, default=75, help="dev queries a language")
    parser.add_argument("--test-rows", type=int, help="test queries a file; all by default")
    asked = parser.parse_args(words)
    packages = {name: read(asked.data / f"packages.{name}.parquet") for name in LANGUAGES}
    pages = {name: read(asked.data / f"longdocs.{name}.parquet") for name in LONG}
    out, written = asked.out, {}
    for name, rows in packages.items():
        written |= write_pairs(out / f"train/{name}.jsonl", of(rows, "train", asked.rows))
        written |= write_pairs(out / f"test/{name}.jsonl", of(rows, "test", asked.test_rows))
    for name in FROM:
        crossed = across(of(packages[name], "train", asked.rows // 2), packages["en"])
        written |= write_pairs(out / f"train/{name}-en.jsonl", crossed)
        queries = of(packages[name], "test", asked.test_rows)
        written |= write_beir(out / f"test/{name}-en", queries, of(packages["en"], "test"))
    for name, rows in pages.items():
        for split in ("train", "test"):
            some = ({"short": row["query"], "long": row["body"]} for row in of(rows, split))
            written |= write_pairs(out / f"{split}/longdocs-{name}.jsonl", list(some))
    mixed = [row for rows in packages.values() for row in of(rows, "dev", asked.dev_rows)]
    written |= write_pairs(out / "dev/mixed.jsonl", mixed)
    refuse_leaks(out)
    shown = columns("file", "rows")
    for path, count in written.items():
        shown.add_row(str(path), f"{count:,}")
    results().print(shown)


def read(path: Path) -> list[Row]:
    """All rows, whose order is random."""
    return pq.read_table(path).to_pylist()


def of(rows: Iterable[Row], split: str, most: int | None = None) -> list[Row]:
    """The first rows of a split."""
    return [row for row in rows if row["split"] == split][:most]


def across(rows: Iterable[Row], english: Iterable[Row]) -> list[Row]:
    """The same packages with their English description."""
    described = {row["id"]: row["long"] for row in english}
    known = (row for row in rows if row["id"] in described)
    return [{"short": row["short"], "long": described[row["id"]]} for row in known]


def write_pairs(path: Path, rows: Sequence[Row]) -> dict[Path, int]:
    """Examples of a query and its one document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_examples(path, (Example(row["short"], (row["long"],)) for row in rows))
    return {path: len(rows)}


def write_beir(out: Path, queries: Sequence[Row], documents: Sequence[Row]) -> dict[Path, int]:
    """Queries in one language, all documents of another, and which belongs to which."""
    known = {row["id"] for row in documents}
    asked = [row for row in queries if row["id"] in known]
    judged = "".join(f"{row['id']}\t{row['id']}\t1\n" for row in asked)
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    with replacing_file(out / "qrels/test.tsv") as fresh:
        fresh.write_text(f"query-id\tcorpus-id\tscore\n{judged}", encoding="utf-8")
    write_lines(out / "corpus.jsonl", ({"_id": r["id"], "text": r["long"]} for r in documents))
    write_lines(out / "queries.jsonl", ({"_id": r["id"], "text": r["short"]} for r in asked))
    return {out: len(asked)}


def write_lines(path: Path, records: Iterable[Row]) -> None:
    """A line of JSON for each record."""
    with replacing_file(path) as fresh:
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        fresh.write_text("".join(lines), encoding="utf-8")


def refuse_leaks(out: Path) -> None:
    """Stop where a text that is measured stands in the training data too."""
    learned = {normal_form(text) for text in texts_of(out / "train")}
    for part in ("dev", "test"):
        for text in texts_of(out / part):
            if normal_form(text) in learned:
                raise SystemExit(f"{out / part}: {text!r} is in the training data too")


def texts_of(folder: Path) -> Iterator[str]:
    """All texts of the files in a folder."""
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield from (record[name] for name in ("text", "query") if name in record)
            yield from record.get("positives", ())


if __name__ == "__main__":
    main()
