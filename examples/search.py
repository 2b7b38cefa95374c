"""Index texts, search them, and see what smaller vectors cost.

    python examples/search.py

The texts are descriptions of Debian packages, found by the line about each of them.
"""

from pathlib import Path

import pyarrow.parquet as pq

from tercet import Document, IndexOptions, index, open_index

PACKAGES = Path(__file__).parent / "data/packages.en.parquet"
QUESTIONS = ("tell me when my battery runs low", "turn a folder of photos into a web gallery")


def main(
    out: Path = Path("runs/examples/search"),
    model: str = "minilm",
    documents: int = 1_000,
    queries: int = 300,
) -> None:
    """Index in full and in 4 bits, print how often the right text is found, and ask questions."""
    rows = pq.read_table(PACKAGES, filters=[("split", "=", "test")]).slice(0, documents).to_pylist()
    texts = [Document(row["id"], row["long"], title=row["id"]) for row in rows]
    asked = rows[:queries]
    for stored in ("float32", "int4"):
        folder = out / stored
        index(texts, model, folder, IndexOptions(precision=stored), say=print)
        size = sum(file.stat().st_size for file in folder.rglob("*.npy"))
        with open_index(folder) as opened:
            found = opened.search([row["short"] for row in asked], k=10)
            hits = [
                row["id"] in [hit.record.id for hit in hits]
                for row, hits in zip(asked, found, strict=True)
            ]
            share = sum(hits) / len(hits)
            print(
                f"{stored}: the right text among the first 10 for {share:.1%} of the queries, ",
                end="",
            )
            print(f"{size / len(texts):,.0f} bytes a text\n")

    with open_index(out / "float32") as opened:
        for question, hits in zip(QUESTIONS, opened.search(QUESTIONS, k=3), strict=True):
            print(question)
            for hit in hits:
                line = " ".join(hit.record.text.split())[:70]
                print(f"  {hit.score:.3f}  {hit.record.title}: {line}")


if __name__ == "__main__":
    main()
