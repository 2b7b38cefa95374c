"""Commands that measure models: eval, sizes, tune-weights, probe and diagnose."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from tercet.cli.options import (
    DimsListOption,
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
from tercet.errors import RecipeError
from tercet.files.artifacts import write_json
from tercet.files.console import columns, results, say
from tercet.files.outputs import check_files, check_output
from tercet.kinds import KINDS, Weights
from tercet.models.zoo import zoo

if TYPE_CHECKING:
    from tercet.evaluate.insight.latents import LatentUse
    from tercet.evaluate.measures.retention import Retained
    from tercet.evaluate.measures.tuned_weights import Tuned
    from tercet.evaluate.report.intervals import Interval
    from tercet.evaluate.suites.averages import Averages
    from tercet.evaluate.suites.by_language import SetScores
    from tercet.evaluate.suites.comparison import LanguageComparison

OtherModelsOption = Annotated[
    list[str] | None, typer.Option(help="Another model to compare with; may be repeated.")
]
BootstrapSeed = Annotated[int, typer.Option(help="Of the bootstrap.")]
StoreAsOption = Annotated[
    Literal["float32", "bfloat16", "int8", "int4", "binary"],
    typer.Option(
        help="float32 or bfloat16: of the model's weights. int8, int4 or binary: of the vectors "
        "that documents are stored as, with weights in float32."
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Write all figures to this file too.")
]

_CHOSEN_BY: Final = {
    "usual": "no method: no others rank better than the usual weights",
    "grid": "the grid",
    "logistic": "logistic regression",
}


# ---- eval ------------------------------------------------------------------------------------


def evaluate(
    model: ModelName,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Examples, pairs of texts with a score, or labelled texts (.jsonl, .parquet), "
            "a folder in the layout of BEIR or FlagEmbedding, or a folder of such sets."
        ),
    ] = None,
    against: OtherModelsOption = None,
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
        int | None, typer.Option(min=1, help="Learn from at most this many texts of each label.")
    ] = None,
    dims: Annotated[int | None, typer.Option(help="Keep this many coordinates.")] = None,
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
        int | None,
        typer.Option(min=1, help="A start token before each run of this many tokens (MCLS)."),
    ] = None,
    query_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longer queries are cut; None: as the model says.")
    ] = None,
    document_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longer documents are cut; None: as the model says.")
    ] = None,
    precision: StoreAsOption = "float32",
    seed: BootstrapSeed = 0,
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
    figures: JsonOption = None,
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
    a file with text and label: how well its vectors separate the labels, learned from the records
    whose split is train and predicted for those whose split is test; without split, found by
    clustering.

    Of a folder of sets, such as de.jsonl and ko-en/, every set is measured, and the means over
    languages and families, separately for sets in one language, from one to another, and in many.

    Example: tercet eval runs/mine/model test.jsonl --against minilm
    """
    from tercet.evaluate.sets.location import sets_in
    from tercet.evaluate.suites.comparison import (
        KEPT,
        ComparisonOptions,
        LanguageComparison,
        compare,
        compare_by_language,
    )
    from tercet.evaluate.suites.suite import open_set
    from tercet.rank.quantized import PRECISIONS

    if task is not None and not prompts:
        raise RecipeError("--task and --no-prompts exclude each other; give one of them")
    if (data is None) == (mteb is None):
        raise RecipeError("give either data to measure on, or --mteb with a task")
    read = [data, model, *(against or ())]
    check_files(read, json=figures, plot=plot)
    if keep is not None:
        check_output(keep, read, KEPT, flag="--keep")
    names = _names(model, against)
    load_model = partial(
        load,
        dtype="float32" if precision in PRECISIONS else precision,
        attention=attention,
        pooling=pooling,
        echo=echo,
        cls_every=cls_every,
        query_tokens=query_tokens,
        document_tokens=document_tokens,
    )
    codes = precision if precision in PRECISIONS else None
    of_one_set = {"kinds": kinds, "weights": weights, "protocol": protocol, "per-label": per_label}
    of_sets = {"seen": seen, "keep": keep, "plot": plot}
    if data is None or mteb:
        of_data = of_one_set | of_sets | {"task": task, "split": split, "precision": codes}
        _refuse_ignored("--mteb", of_data)
        _measure_tasks(names, mteb or (), load_model, dims=dims, prompts=prompts, figures=figures)
        return
    if locations := sets_in(data):
        _refuse_ignored("a folder of sets", of_one_set)
    else:
        _refuse_ignored("a single set", of_sets)
    options = ComparisonOptions(
        task=task,
        prompts=prompts,
        baselines=bm25,
        split=split,
        dims=dims,
        precision=codes,
        kinds=kinds_of(kinds),
        weights=weights_of(weights),
        protocol=protocol,
        seen=None if seen is None else [lang.strip() for lang in seen.split(",")],
        keep=keep,
        seed=seed,
    )
    if locations:
        found = compare_by_language(names, load_model, locations, options)
        _show_languages(found)
    else:
        examined = open_set(data, split=split, per_label=per_label, seed=seed)
        found = compare(names, load_model, examined, options)
        results().print(found.size)
        _show_figures(found.metrics, found.figures, found.differences, found.title)
    if figures is not None:
        write_json(figures, found.record(data), default=asdict)
    if plot is not None and isinstance(found, LanguageComparison):
        _draw_languages(plot, found)


def _names(model: str, against: list[str] | None) -> list[str]:
    """Return all models, each once; an unknown one raises before the first is measured."""
    names: list[str] = list(dict.fromkeys([str(model), *(against or [])]))
    for name in names:
        zoo.resolve(name, say)
    return names


def _refuse_ignored(what: str, given: Mapping[str, Any]) -> None:
    if ignored := [name for name, value in given.items() if value is not None]:
        raise RecipeError(f"--{ignored[0]} does not apply to {what}; remove it")


def _show_figures(
    metrics: Sequence[str],
    figures: "Mapping[str, Mapping[str, Interval]]",
    differences: "Mapping[str, Mapping[str, Interval]]",
    title: str,
) -> None:
    table = columns("model", *metrics)
    for name, row in figures.items():
        table.add_row(name, *map(str, row.values()))
    results().print(table)
    if differences:
        gains = columns(title, *metrics)
        for name, row in differences.items():
            gains.add_row(name, *(gain.signed() for gain in row.values()))
        results().print(gains)


def _show_languages(found: "LanguageComparison") -> None:
    _show_sets(found)
    _show_averages(found)
    if any(each.axis == "mixed" for each in found.first):
        _show_bias(found)
    unknown = [each.name for each in found.first if each.axis == "unknown"]
    if unknown:
        say(
            f"{', '.join(unknown)}: of unknown language, so left out of all averages; name the "
            'file by its language (de.jsonl, ko-en/), or add "lang" to its records'
        )


def _show_sets(found: "LanguageComparison") -> None:
    from tercet.evaluate.report.intervals import interval
    from tercet.evaluate.suites.comparison import main_scores

    head = ("set", "axis", "languages", "queries", "nDCG@10", "Recall@100")
    table = columns(*head, *(f"minus {name}" for name in found.others))
    for each in found.first:
        figure = interval(main_scores(each), seed=found.options.seed)
        recall = f"{each.scores['recall@100'].mean():.3f}"
        row = (each.name, each.axis, each.languages, f"{len(each.langs):,}", str(figure), recall)
        table.add_row(*row, *(found.difference(each, name).signed() for name in found.others))
    results().print(table)


def _show_averages(found: "LanguageComparison") -> None:
    """Print averages of every system, and by how much the first one is better."""
    table = columns("nDCG@10 over", *found.scores)
    gains = columns(f"{next(iter(found.scores))} minus", *found.others)
    for label, axis in found.axes.items():
        for shown, part in ((table, axis.figures), (gains, axis.differences)):
            cells = [_cells(each, signed=shown is gains) for each in part.values()]
            for row in cells[0] if cells else ():
                shown.add_row(f"{label}: {row}", *(each[row] for each in cells))
    for shown in (table, gains):
        if shown.row_count:
            results().print(shown)


def _cells(found: "Averages", *, signed: bool) -> dict[str, str]:
    return {
        row: f"{figure.signed() if signed else figure} {lang}".rstrip()
        for row, figure, lang in found.rows()
    }


def _show_bias(found: "LanguageComparison") -> None:
    """Print whether documents in the query's own language displace those that answer it."""
    head = ("mixed set", "queries in", "nDCG@10", "answer in own language", "in another")
    bias = ("first 10 in own language", "corpus", "more than its share")
    table = columns("system", *head, *bias)
    for name, sets in found.scores.items():
        for each in (one for one in sets if one.axis == "mixed"):
            langs = sorted(set(each.langs)) if sets is found.first else ()
            for lang in (None, *langs):
                table.add_row(name, *_bias_row(each, lang, found.options.seed))
    results().print(table)


def _bias_row(each: "SetScores", lang: str | None, seed: int) -> list[str]:
    from tercet.evaluate.suites.averages import language_bias
    from tercet.evaluate.suites.suite import MAIN

    row = [each.name, lang or "all"]
    found = language_bias(each, MAIN, lang=lang, seed=seed)
    if found is None:
        return [*row, "nothing was found"]
    figures = [str(it) if it.queries else "" for it in (found.figure, found.own, found.other)]
    return [*row, *figures, f"{found.same:.3f}", f"{found.chance:.3f}", found.bias.signed()]


def _draw_languages(path: Path, found: "LanguageComparison") -> None:
    from tercet.evaluate.report.figures import dots, drawing, write_png

    if not found.axes:
        raise RecipeError(f"--plot {path}: all sets are of unknown language; nothing to draw")
    panels = {
        label: {
            lang: {name: each.languages[lang] for name, each in axis.figures.items()}
            for lang in next(iter(axis.figures.values())).languages
        }
        for label, axis in found.axes.items()
    }
    with drawing():
        write_png(path, dots(panels, y="nDCG@10", baselines=found.others))


def _measure_tasks(
    names: Sequence[str],
    tasks: Sequence[str],
    load_model: Callable[[str], Any],
    *,
    dims: int | None,
    prompts: bool,
    figures: Path | None,
) -> None:
    from tercet.evaluate.measures.prompts import drop_prompts
    from tercet.evaluate.measures.retrieval import conditions, versions
    from tercet.evaluate.suites.mteb import as_mteb, named_tasks, run_tasks

    chosen = named_tasks(tasks)
    record: dict[str, Any] = {"models": {}, "results": {}, "versions": versions("mteb", "datasets")}
    table = columns("model", "task", "part", "figure", "score", "Recall@100")
    for name in names:
        embedder = load_model(name)
        if not prompts:
            drop_prompts(embedder)
        record["models"][name] = conditions(embedder, dims=dims)
        rows = record["results"][name] = []
        for score in run_tasks(as_mteb(embedder, name, dims=dims), chosen):
            rows.append(asdict(score) | {"score": None if score.skipped else score.score})
            if score.skipped:
                say(f"{score.task}: skipped: {score.skipped}")
                continue
            recall = dict(score.more).get("recall@100")
            cells = (score.part, score.figure, f"{score.score:.3f}")
            table.add_row(name, score.task, *cells, "" if recall is None else f"{recall:.3f}")
        if figures is not None:  # after each model: a later one may take hours
            write_json(figures, record)
    if table.row_count:
        results().print(table)


# ---- sizes -----------------------------------------------------------------------------------


def sizes(
    model: ModelName,
    data: Annotated[
        Path,
        typer.Argument(
            help="Examples (.jsonl, .parquet), or a folder in the layout of BEIR or FlagEmbedding."
        ),
    ],
    dims: DimsListOption = None,
    split: Annotated[str | None, typer.Option(help="Of a folder; None: its only one.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Use the model's prompts for it; None: what the data is called."),
    ] = None,
    metric: Annotated[str, typer.Option(help="What is compared.")] = "ndcg@10",
    factor: Annotated[
        int, typer.Option(min=1, help="Candidates for each place, which are scored again.")
    ] = 4,
    precision: Precision = "float32",
    seed: BootstrapSeed = 0,
    figures: JsonOption = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them into this PNG file.")] = None,
) -> None:
    """Show how well documents are found when their vectors are stored in fewer bytes.

    Texts are encoded once. Each number of coordinates is measured in float32 and in codes of 8, 4
    and 1 bits, with the queries as they are. binary+int8 finds candidates by the signs of documents
    and scores these again by int8 codes, which may stay on the disk. The difference to all
    coordinates in float32 has a 95 % interval over the same queries.

    Example: tercet sizes runs/mine/model test.jsonl --dims 256 --plot sizes.png
    """
    from tercet.evaluate.measures.prompts import known_task, task_names
    from tercet.evaluate.measures.retention import chosen_dims, retention
    from tercet.evaluate.measures.retrieval import depth_of
    from tercet.evaluate.sets.retrieval_set import RetrievalSet

    depth_of(metric)  # raises for an unknown metric before the work
    check_files([model, data], json=figures, plot=plot)
    examined = RetrievalSet.from_path(data, split)
    embedder = load(model, precision)
    if task is not None:
        embedder.settings.prompt("query", task)  # raises for an unknown task
    names = task_names(data, examples=not data.is_dir())
    found = retention(
        embedder,
        examined,
        task=task or known_task(embedder.settings, names),
        dims=chosen_dims(embedder, dims),
        names=(metric,),
        factor=factor,
        progress=True,
    )
    results().print(examined.size)
    rows = [
        {
            "dims": each.dims,
            "stored": each.stored,
            "bytes": each.bytes,
            "limit": each.limit,
            "learned_here": each.learned,
            metric: each.result.interval(metric, seed=seed),
            "minus_first": each.minus(found[0], metric, seed),
        }
        for each in found
    ]
    _show_sizes(found, metric, seed)
    if learned := dict.fromkeys(str(each.dims) for each in found if each.learned):
        say(
            f"the ranges of codes of {', '.join(learned)} coordinates were learned from the "
            "documents of this set, never from its queries; save some with the model: "
            "tercet calibrate"
        )
    if figures is not None:
        record = {"data": str(data), "model": str(model), "metric": metric, "rows": rows}
        write_json(figures, record, default=asdict)
    if plot is not None:
        _draw_sizes(plot, found, metric, seed)


def _show_sizes(found: "Sequence[Retained]", metric: str, seed: int) -> None:
    full = found[0]
    best = full.result.mean(metric)
    table = columns("coordinates", "stored as", "bytes", metric, "minus the first", "kept")
    for each in found:
        value = each.result.interval(metric, seed=seed)
        loss = "" if each is full else each.minus(full, metric, seed).signed()
        share = f"{value.mean / best:.1%}" if best else ""
        table.add_row(str(each.dims), each.stored, f"{each.bytes:,}", str(value), loss, share)
    results().print(table)


def _draw_sizes(path: Path, found: "Sequence[Retained]", metric: str, seed: int) -> None:
    from tercet.evaluate.report.figures import CurvePoint, curves, drawing, write_png

    lines: dict[str, list[CurvePoint]] = {}
    for each in found:
        value = each.result.interval(metric, seed=seed)
        point = CurvePoint(float(each.bytes), value, str(each.dims))
        lines.setdefault(each.stored, []).append(point)
    with drawing():
        write_png(path, curves(lines, x="bytes a vector", y=metric))


# ---- tune-weights ----------------------------------------------------------------------------


def tune_weights(
    model: Annotated[str, typer.Argument(help="Folder of a model with several kinds of vectors.")],
    dev: Annotated[
        Path,
        typer.Argument(
            help="Examples (.jsonl, .parquet), or a folder in the layout of BEIR or FlagEmbedding."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Weights for this task, with its prompts; None: the usual weights."),
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep them in the model's folder.")] = False,
    metric: Annotated[str, typer.Option(help="What to make large.")] = "ndcg@10",
    kinds: KindsOption = None,
    folds: Annotated[
        int, typer.Option(min=2, help="Parts of the queries, each measured by the others' weights.")
    ] = 5,
    depth: Annotated[
        int, typer.Option(min=1, help="Candidates of each query by each kind.")
    ] = 1_000,
    split: Annotated[str, typer.Option(help="Of a folder.")] = "dev",
    precision: Precision = "float32",
    seed: Annotated[int, typer.Option(help="Of the folds and the bootstrap.")] = 0,
) -> None:
    """Find the weights by which the sum of scores ranks best, and what they gain.

    Each query is measured with weights that the other folds chose, so the gain holds for queries
    that nobody has tuned on. With --save, search and eval take the weights from then on. Vectors
    do not change. A kind that --kinds leaves out gets the weight 0, since the others' weights were
    found without it.

    Example: tercet tune-weights runs/mine/model dev.jsonl --save
    """
    from tercet.evaluate.measures.prompts import task_names
    from tercet.evaluate.measures.retrieval import depth_of
    from tercet.evaluate.measures.tuned_weights import (
        dev_candidates,
        require_settings,
        save_weights,
        tune,
    )
    from tercet.evaluate.sets.retrieval_set import RetrievalSet

    depth_of(metric)  # raises for an unknown metric before the work
    folder = zoo.resolve(model, say)
    if save:
        require_settings(folder)
    data = RetrievalSet.from_path(dev, split if dev.is_dir() else None)
    data.require_judgements("tune-weights")
    embedder = load(model, precision)
    wanted = kinds_of(kinds) or embedder.kinds
    if len(wanted) < 2:
        raise RecipeError(
            f"{model}: makes only {', '.join(wanted)} vectors, so there are no weights to tune; "
            "use a model with several kinds (tercet train bge-m3)"
        )
    names = (task,) if task else task_names(dev, examples=not dev.is_dir())
    found = dev_candidates(embedder, data, tasks=names, kinds=wanted, depth=depth, progress=True)
    tuned = tune(data, found, metric=metric, folds=folds, seed=seed)
    results().print(data.size)
    _show_weights(tuned, seed)
    if not save:
        say("nothing was saved; add --save to save them with the model")
        return
    save_weights(folder, tuned.weights, task or "")
    what = f"for the task {task!r}" if task else "as its usual ones"
    left_out = " and ".join(kind for kind in embedder.kinds if kind not in wanted)
    rest = f"; {left_out} has the weight 0: sums leave it out" if left_out else ""
    results().print(f"{folder}: saved these weights {what}{rest}", soft_wrap=True)
    before = embedder.settings.weights.get(task or "")
    if before is not None:
        say(f"the weights before: {','.join(f'{before.of(kind):g}' for kind in KINDS)}")


def _show_weights(tuned: "Tuned", seed: int) -> None:
    table = columns("weights", *tuned.kinds, f"{tuned.metric}, held out", "tuned minus these")
    rows = {"tuned": tuned.weights, "usual": Weights().only(tuned.kinds)}
    rows |= {kind: Weights(1.0, 1.0, 1.0).only((kind,)) for kind in tuned.kinds}
    for name, weights in rows.items():
        numbers = [f"{weights.of(kind):g}" for kind in tuned.kinds]
        gain = "" if name == "tuned" else tuned.gain(name, seed).signed()
        table.add_row(name, *numbers, str(tuned.interval(name, seed)), gain)
    results().print(table)
    of_folds = "; ".join(
        ",".join(f"{each.of(kind):g}" for kind in tuned.kinds) for each in tuned.folds
    )
    say(f"weights that the folds were measured with: {of_folds}")
    say(
        f"chosen by {_CHOSEN_BY[tuned.method]}; on the same queries that chose them: "
        f"{tuned.fitted:.3f}, which is too optimistic"
    )


# ---- diagnose and probe ----------------------------------------------------------------------


def diagnose(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for numbers, figures and report.html.")],
    against: OtherModelsOption = None,
    text: Annotated[
        Path | None, typer.Option(help="Texts to map: .txt, .jsonl or .parquet; None: our own.")
    ] = None,
    triples: Annotated[
        Path | None, typer.Option(help="Lines with prefix, query, positive, negative.")
    ] = None,
    precision: Precision = "float32",
    seed: BootstrapSeed = 0,
) -> None:
    """Show what reading both ways does to a decoder, and whether it needs training for it.

    Writes how far a beginning depends on what follows it, and how the states of both directions
    differ layer by layer. Later stages are compared with --against. Of a model with latent
    attention it also shows how much of its dictionary each head uses.

    Example: tercet diagnose smollm2 --against runs/mine/1-mntp/model --out runs/diagnosis
    """
    from tercet.evaluate.insight.diagnose import DIAGNOSIS, Material, diagnose, prefix_table
    from tercet.evaluate.insight.latents import LABELS, latent_use
    from tercet.evaluate.report.figures import drawing, heat_maps, write_png

    check_output(out, [model, *(against or ()), text, triples], DIAGNOSIS)
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
    for name, use in uses.items():
        table = columns(f"latents of {name}", *next(iter(use.rows().values())))
        for head, row in use.rows().items():
            table.add_row(head, *(f"{number:.3f}" for number in row.values()))
        results().print(table)


def _show_layers(means: dict[str, Any]) -> None:
    """Print the cosines of causal and bidirectional states; an encoder has no row."""
    table = columns("both ways and causal", "mean cosine", "lowest", "in layer", "last layer")
    for name, layers in means.items():
        place = f"{layers.argmin() + 1} of {len(layers)}"
        table.add_row(
            name, f"{layers.mean():.3f}", f"{layers.min():.3f}", place, f"{layers[-1]:.3f}"
        )
    if means:
        results().print(table)


def probe(
    model: ModelName,
    train: Annotated[Path, typer.Option(help="Labelled words: CoNLL columns or .jsonl.")],
    test: Annotated[Path, typer.Option(help="The same, of other sentences.")],
    against: OtherModelsOption = None,
    column: Annotated[
        int | None, typer.Option(help="Of the label, from 1; None: the last.")
    ] = None,
    predictor: Annotated[
        bool, typer.Option(help="Take a word's vector one token earlier, where MNTP predicts it.")
    ] = False,
    attention: ReadingOption = None,
    precision: Precision = "float32",
    seed: BootstrapSeed = 0,
) -> None:
    """Learn labels of words from their vectors alone, to see what a model knows of single words.

    Example: tercet probe smollm2 --train train.conll --test test.conll --against runs/mine/model
    """
    from tercet.data.files.conll import read_labelled
    from tercet.evaluate.measures.latent_words import ProbedModel, compare_words

    names = _names(model, against)
    sentences = [read_labelled(path, column) for path in (train, test)]
    stages = [
        ProbedModel(name, partial(load, name, precision, attention=attention), predictor)
        for name in names
    ]
    header, *rows = compare_words(stages, *sentences, seed=seed).rows()
    table = columns(*header)
    for row in rows:
        table.add_row(*row)
    results().print(table)
