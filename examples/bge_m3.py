"""Train one model that makes three kinds of vectors: dense, sparse and one for each token.

    python examples/bge_m3.py

Hard negatives are mined first. Then all kinds are trained together, and the sum of their scores
teaches each of them. The texts are Debian packages.
"""

from pathlib import Path

import pyarrow.parquet as pq

from tercet import (
    Embedder,
    Example,
    Mining,
    RetrievalSet,
    Run,
    bge_m3,
    measure,
    measure_kinds,
    mine,
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
    out: Path = Path("runs/examples/bge_m3"),
    model: str = "me5-small",
    rows: int = 800,
    steps: int = 25,
    tests: int = 200,
) -> None:
    """Mine, train, and print nDCG@10 on the test split: of the base, then of each kind and sum."""
    write_examples(out / "data/pairs.jsonl", pairs("train", rows))
    test = RetrievalSet.from_examples(pairs("test", tests), "test")
    base = Embedder.load(model)
    before = measure(base, test).result
    mine(
        base,
        [open_source(out / "data/pairs.jsonl")],
        out / "data/mined.jsonl",
        mining=Mining(negatives=2),
        work=out / "data/work",
    )

    recipe = bge_m3(
        model=model,
        stages="unified",
        unified_steps=steps,
        unified_batch_size=16,
        unified_negatives=2,
        unified_learning_rate=5e-5,
        document_tokens=128,
    )
    mined = {"examples": [open_source(out / "data/mined.jsonl")]}
    trained = train(recipe, mined, out / "run", run=Run(show_progress=False), say=print)

    print(f"nDCG@10 of {model:<18} {before.interval('ndcg@10')}")
    for kinds, result in measure_kinds(trained, test).results.items():
        print(f"trained, {kinds:<20} {result.interval('ndcg@10')}", end="")
        print(f"  difference {result.minus(before, 'ndcg@10').signed()}")


if __name__ == "__main__":
    main()
