"""Fine-tune a small model on pairs of texts, and measure it on pairs that it has not seen.

    python examples/finetune.py

The pairs are Debian packages: the line about a package is the query, its description the document.
Each section of the archive is a separate source, and a batch has one source: the model learns to
distinguish a web server from other web servers, not from games.
"""

from pathlib import Path

import pyarrow.parquet as pq

from tercet import (
    Embedder,
    Example,
    RetrievalSet,
    Run,
    finetune,
    measure,
    open_sources,
    train,
    write_examples,
)

PACKAGES = Path(__file__).parent / "data/packages.en.parquet"


def packages(split: str, count: int) -> list[dict[str, str]]:
    """Return the first packages of a split; the file is in random order."""
    return pq.read_table(PACKAGES, filters=[("split", "=", split)]).slice(0, count).to_pylist()


def pairs(rows: list[dict[str, str]]) -> list[Example]:
    """Return the line about each package with its description."""
    return [Example(row["short"], (row["long"],)) for row in rows]


def main(
    out: Path = Path("runs/examples/finetune"),
    model: str = "minilm",
    rows: int = 8_000,
    batch: int = 32,
    steps: int = 60,
    tests: int = 1_000,
) -> None:
    """Train on pairs of the train split, and print nDCG@10 on the test split before and after."""
    sections: dict[str, list[dict[str, str]]] = {}
    for row in packages("train", rows):
        sections.setdefault(row["section"], []).append(row)
    for name, some in sections.items():
        if len(some) >= batch:
            write_examples(out / "data" / f"{name.replace('/', '-')}.jsonl", pairs(some))
    test = RetrievalSet.from_examples(pairs(packages("test", tests)), "test")
    before = measure(Embedder.load(model), test).result

    recipe = finetune(
        model=model, steps=steps, batch_size=batch, learning_rate=1e-4, temperature=0.03
    )
    sources = open_sources(out / "data")
    trained = train(recipe, sources, out / "run", run=Run(show_progress=False), say=print)

    after = measure(trained, test).result
    print(f"nDCG@10 before  {before.interval('ndcg@10')}")
    print(f"nDCG@10 after   {after.interval('ndcg@10')}")
    print(f"difference      {after.minus(before, 'ndcg@10').signed()}")


if __name__ == "__main__":
    main()
