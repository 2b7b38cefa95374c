"""Verbs that say how good a model is, and why."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tercet import zoo
from tercet.cli.loading import Echo, ModelName, PoolingOption, Precision, ReadingOption, load
from tercet.console import columns, results, say
from tercet.errors import RecipeError

if TYPE_CHECKING:
    from tercet.evaluate.latents import LatentUse

Against = Annotated[
    list[str] | None, typer.Option(help="Another model to compare with; may be repeated.")
]
Seed = Annotated[int, typer.Option(help="Of the bootstrap.")]


def evaluate(
    model: ModelName,
    data: Annotated[
        Path,
        typer.Argument(
            help="Examples, pairs of texts with a score, or labelled texts (.jsonl, .parquet), or "
            "a folder in BEIR's layout."
        ),
    ],
    against: Against = None,
    task: Annotated[
        str | None,
        typer.Option(help="Use the model's prompts for it; None: what the data is called."),
    ] = None,
    prompts: Annotated[bool, typer.Option(help="Put the model's prompts before texts.")] = True,
    bm25: Annotated[bool, typer.Option(help="Compare with words in common as well.")] = True,
    per_label: Annotated[
        int | None, typer.Option(min=1, help="Learn from so many texts of each label only.")
    ] = None,
    dims: Annotated[int | None, typer.Option(help="Keep so many coordinates.")] = None,
    attention: ReadingOption = None,
    pooling: PoolingOption = None,
    echo: Echo = False,
    precision: Precision = "float32",
    seed: Seed = 0,
) -> None:
    """Measure how well a model finds the right documents, with 95 % intervals.

    On a file of pairs with text1, text2 and score: how well its cosines agree with the scores. On
    a file with text and label: how well its vectors tell the labels, learned from the records
    whose split is train and asked of those whose split is test; without split, found by
    clustering.

    Example: tercet eval runs/mine/model test.jsonl --against minilm
    """
    from tercet.data.labelled import is_labelled_file
    from tercet.data.similarity import is_similarity_file

    if task is not None and not prompts:
        raise RecipeError("--task and --no-prompts exclude each other; give one of them")
    names = _names(model, against)
    read = partial(load, precision=precision, attention=attention, pooling=pooling, echo=echo)
    examples = False
    if not data.is_dir() and is_similarity_file(data):
        compared = _similarity(data)
    elif not data.is_dir() and is_labelled_file(data):
        compared = _labels(data, per_label, seed)
    else:
        compared, examples = _retrieval(data), not data.is_dir()
    asked = _Asked(data, task, prompts, examples)
    measured = {}
    for name in names:
        embedder = read(name)
        known = asked.of(name, embedder, first=name == names[0])
        measured[name] = compared.measure(embedder, task=known, dims=dims, progress=True)
    if bm25:
        measured[compared.baseline] = compared.by_words()
    results().print(compared.what)
    first, *others = measured
    _show(
        compared.metrics,
        {n: [r.interval(m, seed=seed) for m in compared.metrics] for n, r in measured.items()},
        {
            n: [compared.minus(measured[first], measured[n], m, seed) for m in compared.metrics]
            for n in others
        },
    )


@dataclass(frozen=True, slots=True)
class _Compared:
    """A set, and how models are measured on it."""

    what: str  # it holds
    metrics: Sequence[str]
    measure: Callable[..., Any]
    baseline: str
    by_words: Callable[[], Any]
    minus: Callable[[Any, Any, str, int], Any] = lambda it, other, metric, seed: it.minus(
        other, metric, seed=seed
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """Which prompts a user wants."""

    data: Path
    task: str | None
    prompts: bool
    examples: bool  # whether the data are records that may name their task

    def of(self, name: str, embedder: Any, *, first: bool) -> str | None:
        """The task whose prompts this model uses, and word of it; None for its default ones.

        The task that a user names has to be known by the first model, not by those it is
        compared with.
        """
        from tercet.evaluate.prompts import drop_prompts, known_task, task_names

        settings = embedder.settings
        if not self.prompts:
            drop_prompts(embedder)
            return None
        if self.task is not None:
            if first:
                settings.prompt("query", self.task)  # refuses an unknown one
            known = known_task(settings, (self.task,))
            if known is None:
                say(f"{name}: knows no task {self.task!r}; its default prompts are used")
            return known
        if not settings.task_prompts:
            return None
        known = known_task(settings, task_names(self.data, examples=self.examples))
        if known is not None:
            say(f"{name}: with its prompts for the task {known!r}")
        return known


def _retrieval(data: Path) -> _Compared:
    from tercet.evaluate.embedders import measure, measure_bm25
    from tercet.evaluate.intervals import paired_difference
    from tercet.evaluate.retrieval import METRICS, RetrievalSet

    examined = RetrievalSet.from_beir(data) if data.is_dir() else RetrievalSet.from_examples(data)
    return _Compared(
        f"{len(examined.queries):,} queries, {len(examined.documents):,} documents",
        METRICS,
        lambda embedder, **how: measure(embedder, examined, **how).result,
        "BM25",
        partial(measure_bm25, examined),
        minus=lambda it, other, metric, seed: paired_difference(
            it.scores[metric], other.scores[metric], seed=seed
        ),
    )


def _similarity(data: Path) -> _Compared:
    from tercet.data.similarity import SimilaritySet
    from tercet.evaluate.similarity import METRICS, measure_overlap, measure_similarity

    examined = SimilaritySet.from_file(data)
    return _Compared(
        f"{len(examined.pairs):,} pairs of {len(examined.texts):,} texts",
        METRICS,
        lambda embedder, **how: measure_similarity(embedder, examined, **how),
        "word overlap",
        partial(measure_overlap, examined),
    )


def _labels(data: Path, per_label: int | None, seed: int) -> _Compared:
    from tercet.evaluate import labels
    from tercet.evaluate.label_sets import ClusteringSet, read_label_set

    examined = read_label_set(data)
    if isinstance(examined, ClusteringSet):
        return _Compared(
            f"{len(examined.rows.texts):,} texts, {len(examined.labels):,} labels",
            labels.CLUSTERING_METRICS,
            lambda embedder, **how: labels.measure_clustering(embedder, examined, **how),
            "TF-IDF",
            partial(labels.measure_clustering_by_words, examined),
        )
    few = examined.sampled(per_label, seed=seed)
    return _Compared(
        f"{len(few.test.texts):,} texts, {len(few.labels):,} labels, learned from "
        f"{len(few.train.texts):,}",
        labels.METRICS,
        lambda embedder, **how: labels.measure_classification(embedder, few, **how),
        "TF-IDF",
        partial(labels.measure_classification_by_words, few),
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
    differ layer by layer. Later stages are compared with --against. Of a model with latent
    attention it also shows how much of its dictionary each head uses.

    Example: tercet diagnose smollm2 --against runs/mine/1-mntp/model --out runs/diagnosis
    """
    from tercet.evaluate.diagnose import Material, diagnose, prefix_table
    from tercet.evaluate.figures import drawing, heat_maps, write_png
    from tercet.evaluate.latents import LABELS, latent_use

    names = _names(model, against)
    material = Material.read(triples, text)
    uses: dict[str, LatentUse] = {}

    def loaded() -> Iterator[tuple[str, Any]]:
        for name in names:
            embedder = load(name, precision)
            if embedder.settings.layer is not None and embedder.settings.layer.kind == "latent":
                uses[name] = latent_use(embedder, material.texts)
            yield name, embedder

    found = diagnose(loaded(), out, material=material, seed=seed)
    prefixes = prefix_table(found, seed=seed)
    readings = columns("model and reading", *next(iter(prefixes.values())))
    for name, row in prefixes.items():
        readings.add_row(name, *map(str, row.values()))
    results().print(readings)
    _show_layers({name: each.layer_means()[1:] for name, each in found.items() if each.maps})
    if uses:
        _show_latents(uses)
        with drawing():
            maps = {name: use.heat_map() for name, use in uses.items()}
            write_png(out / "latents.png", heat_maps(maps, LABELS))
    results().print(f"{out / 'report.html'}", soft_wrap=True)


def _show_latents(uses: "dict[str, LatentUse]") -> None:
    """Which share of its dictionary a latent attention layer uses, head by head."""
    for name, use in uses.items():
        table = columns(f"latents of {name}", *next(iter(use.rows().values())))
        for head, row in use.rows().items():
            table.add_row(head, *(f"{number:.3f}" for number in row.values()))
        results().print(table)


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
