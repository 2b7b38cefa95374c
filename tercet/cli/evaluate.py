"""Verbs that say how good a model is, and why."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tercet.cli.compared import ByKinds, open_set
from tercet.cli.mteb_tasks import measure_tasks
from tercet.cli.options import (
    Echo,
    KindsOption,
    ModelName,
    PoolingOption,
    Precision,
    ReadingOption,
    WeightsOption,
    kinds_of,
    load,
    weights_of,
)
from tercet.cli.suites import WantedOfSets, measure_suite, refuse_idle, sets_in
from tercet.errors import RecipeError
from tercet.files.atomic import replacing_file
from tercet.files.console import columns, results, say
from tercet.models.zoo import zoo
from tercet.rank.quantized import PRECISIONS

if TYPE_CHECKING:
    from tercet.evaluate.insight.latents import LatentUse

Against = Annotated[
    list[str] | None, typer.Option(help="Another model to compare with; may be repeated.")
]
Seed = Annotated[int, typer.Option(help="Of the bootstrap.")]
Stored = Annotated[
    Literal["float32", "bfloat16", "int8", "int4", "binary"],
    typer.Option(
        help="float32 or bfloat16: of the model's weights. int8, int4 or binary: of the vectors "
        "that documents are stored as, with weights in float32."
    ),
]


def evaluate(
    model: ModelName,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Examples, pairs of texts with a score, or labelled texts (.jsonl, .parquet), "
            "a folder in the layout of BEIR or FlagEmbedding, or a folder of such sets."
        ),
    ] = None,
    against: Against = None,
    split: Annotated[
        str | None, typer.Option(help="Of a folder; None: its only one, or test of BEIR's.")
    ] = None,
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
    kinds: KindsOption = None,
    weights: WeightsOption = None,
    protocol: Annotated[
        Literal["exact", "paper", "reference"] | None,
        typer.Option(
            help="How sums of kinds are searched: exact scores every document; paper and "
            "reference repeat BGE-M3's; None: exact, unless that takes very long."
        ),
    ] = None,
    attention: ReadingOption = None,
    pooling: PoolingOption = None,
    echo: Echo = False,
    cls_every: Annotated[
        int | None, typer.Option(min=1, help="A start token before every so many tokens (MCLS).")
    ] = None,
    query_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longer queries are cut; None: as the model says.")
    ] = None,
    document_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longer documents are cut; None: as the model says.")
    ] = None,
    precision: Stored = "float32",
    seed: Seed = 0,
    seen: Annotated[
        str | None,
        typer.Option(help="Languages that training had, such as en,de; of a folder of sets."),
    ] = None,
    mteb: Annotated[
        list[str] | None,
        typer.Option(
            help="A task of mteb in place of data, or beir, miracl or miracl-o; may be repeated."
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file too.")
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            help="Keep what is measured of a folder of sets in this folder, and go on from there."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw a folder of sets by language into this PNG file.")
    ] = None,
) -> None:
    """Measure how well a model finds the right documents, with 95 % intervals.

    A model with several kinds of vectors is measured by each, and by every sum of their weighted
    scores, beside BM25 with words and with its own tokens as words.

    Where queries of a folder have answers in place of judged documents, answer@20 and answer@100
    are the share of queries of which one of the first 20 or 100 documents holds an answer.

    On a file of pairs with text1, text2 and score: how well its cosines agree with the scores. On
    a file with text and label: how well its vectors tell the labels, learned from the records
    whose split is train and asked of those whose split is test; without split, found by
    clustering.

    Of a folder of sets, such as de.jsonl and ko-en/, every set is measured, and the means over
    languages and families, separately for sets in one language, from one to another, and in many.

    Example: tercet eval runs/mine/model test.jsonl --against minilm
    """
    from tercet.evaluate.measures.conditions import conditions, versions

    if task is not None and not prompts:
        raise RecipeError("--task and --no-prompts exclude each other; give one of them")
    if (data is None) == (mteb is None):
        raise RecipeError("give data to measure on, or --mteb and a task in their place")
    names = _names(model, against)
    read = partial(
        load,
        precision="float32" if precision in PRECISIONS else precision,
        attention=attention,
        pooling=pooling,
        echo=echo,
        cls_every=cls_every,
        query_tokens=query_tokens,
        document_tokens=document_tokens,
    )
    coded = precision if precision in PRECISIONS else None
    single = {"kinds": kinds, "weights": weights, "protocol": protocol, "per_label": per_label}
    of_sets = {"seen": seen, "keep": keep, "plot": plot}
    if data is None or mteb:
        refuse_idle("--mteb", single | of_sets | {"task": task, "split": split, "precision": coded})
        measure_tasks(names, mteb or (), read, dims=dims, prompts=prompts, figures=figures)
        return
    if places := sets_in(data):
        refuse_idle("a folder of sets", single)
        how = WantedOfSets(data, split, task, prompts, bm25, dims, coded or "float32", seed)
        measure_suite(names, places, read, replace(how, figures=figures, **of_sets))
        return
    refuse_idle("a single set", of_sets)
    by_kinds = ByKinds(kinds_of(kinds), weights_of(weights), protocol, coded)
    compared = open_set(
        data, task=task, split=split, per_label=per_label, seed=seed, by_kinds=by_kinds
    )
    asked = _Asked(data, task, prompts, compared.retrieval and not data.is_dir())
    measured: dict[str, Any] = {}
    models: dict[str, Any] = {}
    over = False
    for name in names:
        embedder = read(name)
        known = asked.of(name, embedder, first=name == names[0])
        measured |= compared.measure(name, embedder, task=known, dims=dims)
        models[name] = conditions(embedder, dims=dims, stored=coded) | {"task": known}
        if name == names[0]:
            over = len(measured) > 1  # its first kind is what its sums are to be better than
    if bm25:
        measured |= compared.by_words()
    results().print(compared.what)
    first, *others = measured
    table = {
        n: {m: r.interval(m, seed=seed) for m in compared.metrics} for n, r in measured.items()
    }
    differences = {
        n: {
            m: compared.minus(measured[n], measured[first], m, seed)
            if over
            else compared.minus(measured[first], measured[n], m, seed)
            for m in compared.metrics
        }
        for n in others
    }
    title = f"minus {first}" if over else f"{first} minus"
    _show(compared.metrics, table, differences, title)
    if figures is not None:
        record = {"data": str(data), "what": compared.what, "results": table}
        record |= {"differences": {title: differences}, "search": compared.notes}
        record |= {"models": models, "versions": versions("bm25s")}
        with replacing_file(figures) as fresh:
            text = json.dumps(record, indent=2, ensure_ascii=False, default=asdict)
            fresh.write_text(text + "\n", encoding="utf-8")


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
        from tercet.evaluate.measures.prompts import drop_prompts, require_prompt

        settings = embedder.settings
        if not self.prompts:
            drop_prompts(embedder)
            return None
        known = self._known(name, settings, first)
        require_prompt(settings, "query", known, what=name)
        return known

    def _known(self, name: str, settings: Any, first: bool) -> str | None:
        from tercet.evaluate.measures.prompts import known_task, task_names

        if self.task is not None:
            weighed = self.task in settings.weights
            if first and not weighed:
                settings.prompt("query", self.task)  # refuses an unknown one
            known = known_task(settings, (self.task,))
            if known is None and not weighed:
                say(f"{name}: knows no task {self.task!r}; its default prompts are used")
            return known
        if not settings.task_prompts:
            return None
        known = known_task(settings, task_names(self.data, examples=self.examples))
        if known is not None:
            say(f"{name}: with its prompts for the task {known!r}")
        return known


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
    from tercet.evaluate.insight.diagnose import Material, diagnose, prefix_table
    from tercet.evaluate.insight.latents import LABELS, latent_use
    from tercet.evaluate.report.figures import drawing, heat_maps, write_png

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
    from tercet.data.files.conll import read_labelled
    from tercet.evaluate.measures.latent_words import Stage, compare_words

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
    metrics: Sequence[str],
    scores: Mapping[str, Mapping[str, Any]],
    differences: Mapping[str, Mapping[str, Any]],
    title: str,
) -> None:
    """Figures of each model, and how they differ from the first one's."""
    table = columns("model", *metrics)
    for name, row in scores.items():
        table.add_row(name, *map(str, row.values()))
    results().print(table)
    if differences:
        gains = columns(title, *metrics)
        for name, row in differences.items():
            shown = (f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]" for d in row.values())
            gains.add_row(name, *shown)
        results().print(gains)
