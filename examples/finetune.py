"""Fine-tune a small model on pairs of texts, and measure it on pairs that it has not seen.

    python examples/finetune.py

The pairs are Debian packages: the line about a package is the query, its description the document.
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
    open_source,
    train,
    write_examples,
)

PACKAGES = Path(__file__).parent / "data/packages.en.parquet"


def pairs(split: str, count: int) -> list[Example]:
    """Return the first pairs of a split; the file is in random order."""
    rows = pq.read_table(PACKAGES, filters=[("split", "=", split)]).slice(0, count).to_pylist()
    return [Example(row["short"], (row["long"],)) for row in rows]


def main(
    out: Path = Path("runs/examples/finetune"),
    model: str = "minilm",
    rows: int = 4_000,
    steps: int = 60,
    tests: int = 300,
) -> None:
    """Train on pairs of the train split, and print nDCG@10 on the test split before and after."""
    write_examples(out / "data/pairs.jsonl", pairs("train", rows))
    test = RetrievalSet.from_examples(pairs("test", tests), "test")
    before = measure(Embedder.load(model), test).result

    recipe = finetune(model=model, steps=steps, batch_size=32, learning_rate=1e-4, temperature=0.03)
    pairs_file = open_source(out / "data/pairs.jsonl")
    trained = train(recipe, [pairs_file], out / "run", run=Run(show_progress=False), say=print)

    after = measure(trained, test).result
    print(f"nDCG@10 before  {before.interval('ndcg@10')}")
    print(f"nDCG@10 after   {after.interval('ndcg@10')}")
    print(f"difference      {after.minus(before, 'ndcg@10').signed()}")


if __name__ == "__main__":
    main()
