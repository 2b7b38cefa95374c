"""Verbs that say how good a model is, and why."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tercet import zoo
from tercet.cli.loading import Echo, ModelName, PoolingOption, Precision, ReadingOption, load
from tercet.console import columns, results, say

Against = Annotated[
    list[str] | None, typer.Option(help="Another model to compare with; may be repeated.")
]
Seed = Annotated[int, typer.Option(help="Of the bootstrap.")]


def evaluate(
    model: ModelName,
    data: Annotated[
        Path,
        typer.Argument(
            help="Examples, or pairs of texts with a score (.jsonl, .parquet), or a folder in "
            "BEIR's layout."
        ),
    ],
    against: Against = None,
    bm25: Annotated[bool, typer.Option(help="Compare with words in common as well.")] = True,
    dims: Annotated[int | None, typer.Option(help="Keep so many coordinates.")] = None,
    attention: ReadingOption = None,
    pooling: PoolingOption = None,
    echo: Echo = False,
    precision: Precision = "float32",
    seed: Seed = 0,
) -> None:
    """Measure how well a model finds the right documents, with 95 % intervals.

    On a file of pairs with text1, text2 and score: how well its cosines agree with the scores.

    Example: tercet eval runs/mine/model test.jsonl --against minilm
    """
    from tercet.data.similarity import is_similarity_file

    names = _names(model, against)
    read = partial(load, precision=precision, attention=attention, pooling=pooling, echo=echo)
    if not data.is_dir() and is_similarity_file(data):
        _similarity(names, data, read, dims=dims, words=bm25, seed=seed)
    else:
        _retrieval(names, data, read, dims=dims, words=bm25, seed=seed)


def _retrieval(
    names: list[str], data: Path, read: Any, *, dims: int | None, words: bool, seed: int
) -> None:
    from tercet.evaluate.embedders import measure, measure_bm25
    from tercet.evaluate.intervals import paired_difference
    from tercet.evaluate.retrieval import METRICS, RetrievalSet

    examined = RetrievalSet.from_beir(data) if data.is_dir() else RetrievalSet.from_examples(data)
    measured = {
        name: measure(read(name), examined, dims=dims, progress=True).result for name in names
    }
    if words:
        measured["BM25"] = measure_bm25(examined)
    results().print(f"{len(examined.queries):,} queries, {len(examined.documents):,} documents")
    first = measured[names[0]]
    _show(
        METRICS,
        {n: [result.interval(m, seed) for m in METRICS] for n, result in measured.items()},
        {
            n: [paired_difference(first.scores[m], other.scores[m], seed=seed) for m in METRICS]
            for n, other in list(measured.items())[1:]
        },
    )


def _similarity(
    names: list[str], data: Path, read: Any, *, dims: int | None, words: bool, seed: int
) -> None:
    from tercet.data.similarity import SimilaritySet
    from tercet.evaluate.similarity import METRICS, measure_overlap, measure_similarity

    examined = SimilaritySet.from_file(data)
    measured = {
        name: measure_similarity(read(name), examined, dims=dims, progress=True) for name in names
    }
    if words:
        measured["word overlap"] = measure_overlap(examined)
    results().print(f"{len(examined.pairs):,} pairs of {len(examined.texts):,} texts")
    first = measured[names[0]]
    _show(
        METRICS,
        {n: [result.interval(m, seed=seed) for m in METRICS] for n, result in measured.items()},
        {
            n: [first.minus(other, m, seed=seed) for m in METRICS]
            for n, other in list(measured.items())[1:]
        },
    )


def diagnose(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for numbers, figures and report.html.")],
    against: Against = None,
    text: Annotated[
        Path | None, typer.Option(help="Texts to map: .txt, .jsonl or .parquet; None: our own.")
    ] = None,
    triples: Annotated[
        Path | None, typer.Option(help="Lines with prefix, query, positive, negative.")
    ] = None,
    precision: Precision = "float32",
    seed: Seed = 0,
) -> None:
    """Show what reading both ways does to a decoder, and whether it needs training for it.

    Writes how far a beginning depends on what follows it, and how the states of both directions
    differ layer by layer. Later stages are compared with --against.

    Example: tercet diagnose smollm2 --against runs/mine/1-mntp/model --out runs/diagnosis
    """
    from tercet.evaluate.diagnose import Material, diagnose, prefix_table

    names = _names(model, against)
    material = Material.read(triples, text)
    found = diagnose(
        ((name, load(name, precision)) for name in names), out, material=material, seed=seed
    )
    prefixes = prefix_table(found, seed=seed)
    readings = columns("model and reading", *next(iter(prefixes.values())))
    for name, row in prefixes.items():
        readings.add_row(name, *map(str, row.values()))
    results().print(readings)
    _show_layers({name: each.layer_means()[1:] for name, each in found.items() if each.maps})
    results().print(f"{out / 'report.html'}", soft_wrap=True)


def _show_layers(means: dict[str, Any]) -> None:
    """How alike the states of both directions are; an encoder has one, and no row."""
    table = columns("both ways and causal", "mean cosine", "lowest", "in layer", "last layer")
    for name, layers in means.items():
        numbers = (layers.mean(), layers.min(), layers[-1])
        mean, lowest, last = (f"{number:.3f}" for number in numbers)
        table.add_row(name, mean, lowest, f"{layers.argmin() + 1} of {len(layers)}", last)
    if means:
        results().print(table)


def probe(
    model: ModelName,
    train: Annotated[Path, typer.Option(help="Labelled words: CoNLL columns or .jsonl.")],
    test: Annotated[Path, typer.Option(help="The same, of other sentences.")],
    against: Against = None,
    column: Annotated[
        int | None, typer.Option(help="Of the label, from 1; None: the last.")
    ] = None,
    predictor: Annotated[
        bool, typer.Option(help="Take a word's vector one token earlier, where MNTP predicts it.")
    ] = False,
    attention: ReadingOption = None,
    precision: Precision = "float32",
    seed: Seed = 0,
) -> None:
    """Learn labels of words from their vectors alone, to see what a model knows of single words.

    Example: tercet probe smollm2 --train train.conll --test test.conll --against runs/mine/model
    """
    from tercet.data.conll import read_labelled
    from tercet.evaluate.words import Stage, compare_words

    names = _names(model, against)
    sentences = [read_labelled(path, column) for path in (train, test)]
    stages = [
        Stage(name, partial(load, name, precision, attention=attention), predictor)
        for name in names
    ]
    header, *rows = compare_words(stages, *sentences, seed=seed).rows()
    table = columns(*header)
    for row in rows:
        table.add_row(*row)
    results().print(table)


def _names(model: str, against: list[str] | None) -> list[str]:
    """All models, each once; a slip in the last name shows before the first is measured."""
    names: list[str] = list(dict.fromkeys([str(model), *(against or [])]))
    for name in names:
        zoo.resolve(name, say)
    return names


def _show(
    metrics: Sequence[str], scores: dict[str, list[Any]], differences: dict[str, list[Any]]
) -> None:
    """Figures of each model, and by how much the first one leads the others."""
    table = columns("model", *metrics)
    for name, row in scores.items():
        table.add_row(name, *map(str, row))
    results().print(table)
    if differences:
        gains = columns(f"{next(iter(scores))} minus", *metrics)
        for name, row in differences.items():
            gains.add_row(name, *(f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in row))
        results().print(gains)
