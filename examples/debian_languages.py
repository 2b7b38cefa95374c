"""Descriptions of packages in several languages, and long manual pages: data of many tongues.

    python examples/debian_languages.py OUT --data FOLDER

writes OUT/train, OUT/dev and OUT/test from the files packages.LANG.parquet and
longdocs.LANG.parquet of FOLDER. A query is the line about a package, its document the description:
in one language (de.jsonl), or the line in one and the description in English (ko-en.jsonl, and for
the test a folder in BEIR's layout, since English has more documents than there are queries).

    python examples/debian_languages.py OUT --data FOLDER --all

writes all 11 languages, each row with its language: one file a language in OUT/train, OUT/dev and
OUT/test, of which training is in one language alone; in OUT/test also LANG-en for every language,
and `mixed`: a corpus that holds each package in one language, drawn by the seed, and the lines
about it in every language that there is.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq

from tercet.data.files.sources import write_examples
from tercet.data.files.texts import normal_form
from tercet.files.atomic import replacing_file
from tercet.files.console import columns, results
from tercet.types import Example

Row = dict[str, Any]
LANGUAGES: Final = ("en", "ko", "de", "ja")
FROM: Final = ("ko", "ja", "de")  # queries in these, documents in English
LONG: Final = ("en", "ja")
ALL: Final = ("en", "da", "de", "es", "fr", "it", "ja", "ko", "pt_BR", "ru", "zh_CN")


def main(words: list[str] | None = None) -> None:
    """Write all files, check that none of them leaks, and say how large they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--all", action="store_true", help="11 languages, named in every row")
    parser.add_argument("--rows", type=int, help="training rows a file; 2000, with --all all")
    parser.add_argument("--dev-rows", type=int, help="dev queries a language; 75, with --all all")
    parser.add_argument("--test-rows", type=int, help="test queries a file; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of the languages of the mixed corpus")
    asked = parser.parse_args(words)
    written = write_all(asked) if asked.all else write_four(asked)
    refuse_leaks(asked.out)
    shown = columns("file", "rows")
    for path, count in written.items():
        shown.add_row(str(path), f"{count:,}")
    results().print(shown)


def write_four(asked: argparse.Namespace) -> dict[Path, int]:
    """English, Korean, German and Japanese: in one language, to English, and long pages."""
    most = 2_000 if asked.rows is None else asked.rows
    most_dev = 75 if asked.dev_rows is None else asked.dev_rows
    packages = {name: read(asked.data / f"packages.{name}.parquet") for name in LANGUAGES}
    pages = {name: read(asked.data / f"longdocs.{name}.parquet") for name in LONG}
    out, written = asked.out, {}
    for name, rows in packages.items():
        written |= write_pairs(out / f"train/{name}.jsonl", of(rows, "train", most))
        written |= write_pairs(out / f"test/{name}.jsonl", of(rows, "test", asked.test_rows))
    for name in FROM:
        crossed = across(of(packages[name], "train", most // 2), packages["en"])
        written |= write_pairs(out / f"train/{name}-en.jsonl", crossed)
        queries = of(packages[name], "test", asked.test_rows)
        written |= write_beir(out / f"test/{name}-en", queries, of(packages["en"], "test"))
    for name, rows in pages.items():
        for split in ("train", "test"):
            some = ({"short": row["query"], "long": row["body"]} for row in of(rows, split))
            written |= write_pairs(out / f"{split}/longdocs-{name}.jsonl", list(some))
    mixed = [row for rows in packages.values() for row in of(rows, "dev", most_dev)]
    return written | write_pairs(out / "dev/mixed.jsonl", mixed)


def write_all(asked: argparse.Namespace) -> dict[Path, int]:
    """All languages, each alone, each with documents in English, and all in one corpus."""
    packages = {name: read(asked.data / f"packages.{name}.parquet") for name in ALL}
    most = {"train": asked.rows, "dev": asked.dev_rows, "test": asked.test_rows}
    tested = {name: of(rows, "test") for name, rows in packages.items()}
    out, written = asked.out, {}
    for name, rows in packages.items():
        for split, count in most.items():
            path = out / f"{split}/{name}.jsonl"
            written |= write_pairs(path, of(rows, split, count), with_lang=True)
        if name != "en":
            queries = tested[name][: asked.test_rows]
            written |= write_beir(out / f"test/{name}-en", queries, tested["en"], with_lang=True)
    queries, documents = mixed(tested, asked.seed)
    return written | write_mixed(out / "test/mixed", queries[: asked.test_rows], documents)


def mixed(packages: dict[str, list[Row]], seed: int) -> tuple[list[Row], list[Row]]:
    """Queries in all languages, and each package in one of those it is described in.

    Packages that are described in English alone are left out: they would make it an English corpus.
    """
    known: dict[str, list[Row]] = {}
    for rows in packages.values():
        for row in rows:
            known.setdefault(row["id"], []).append(row)
    drawn = random.Random(seed)
    several = [known[name] for name in sorted(known) if len(known[name]) > 1]
    documents = [drawn.choice(rows) for rows in several]
    queries = [row for rows in several for row in rows]
    drawn.shuffle(queries)  # so that the first are of all languages
    return queries, documents


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


def write_pairs(path: Path, rows: Sequence[Row], *, with_lang: bool = False) -> dict[Path, int]:
    """Examples of a query and its one document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    langs = [row["lang"] if with_lang else "" for row in rows]
    pairs = zip(rows, langs, strict=True)
    write_examples(path, (Example(r["short"], (r["long"],), lang=lang) for r, lang in pairs))
    return {path: len(rows)}


def write_beir(
    out: Path, queries: Sequence[Row], documents: Sequence[Row], *, with_lang: bool = False
) -> dict[Path, int]:
    """Queries in one language, all documents of another, and which belongs to which."""
    known = {row["id"] for row in documents}
    asked = [row for row in queries if row["id"] in known]
    write_judgements(out, ((row["id"], row["id"]) for row in asked))
    langs = ("lang",) if with_lang else ()
    write_lines(out / "corpus.jsonl", (record(r, r["id"], "long", langs) for r in documents))
    write_lines(out / "queries.jsonl", (record(r, r["id"], "short", langs) for r in asked))
    return {out: len(asked)}


def write_mixed(out: Path, queries: Sequence[Row], documents: Sequence[Row]) -> dict[Path, int]:
    """Queries and documents of many languages; a query's id names its language too."""
    ids = [f"{row['id']}.{row['lang']}" for row in queries]
    asked = list(zip(ids, queries, strict=True))
    write_judgements(out, ((name, row["id"]) for name, row in asked))
    write_lines(out / "corpus.jsonl", (record(r, r["id"], "long", ("lang",)) for r in documents))
    write_lines(out / "queries.jsonl", (record(r, name, "short", ("lang",)) for name, r in asked))
    return {out: len(asked)}


def write_judgements(out: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Which document belongs to which query."""
    judged = "".join(f"{query}\t{document}\t1\n" for query, document in pairs)
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    with replacing_file(out / "qrels/test.tsv") as fresh:
        fresh.write_text(f"query-id\tcorpus-id\tscore\n{judged}", encoding="utf-8")


def record(row: Row, name: str, text: str, more: Sequence[str]) -> Row:
    """A line of a corpus, or of its queries."""
    return {"_id": name, "text": row[text], **{field: row[field] for field in more}}


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
