"""The command eval: one set, a folder of sets, tasks of mteb, or small vectors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tercet.cli.options import (
    DATA,
    MEASURE,
    READING,
    VECTORS,
    AttentionOption,
    BatchTokensOption,
    CompareWithOption,
    DeviceOption,
    DocumentTokensOption,
    DtypeOption,
    EchoOption,
    Figures,
    JsonOption,
    KindOption,
    KindWeightOption,
    ModelOption,
    NegativeFieldOption,
    PoolOption,
    PositiveFieldOption,
    QueryFieldOption,
    QueryTokensOption,
    SeedOption,
    SplitOption,
    StoreAsOption,
    WidthsOption,
    changed_weights,
    fields_of,
    in_order,
    known_models,
    load,
    local_inputs,
    out_option,
    require_package,
)
from tercet.errors import RecipeError
from tercet.files.console import COMMAND, columns, say
from tercet.files.outputs import check_files, check_output, mark

if TYPE_CHECKING:
    from tercet.data.files.examples import ExampleFields
    from tercet.evaluate.measures.retention import Retained
    from tercet.evaluate.report.intervals import Interval
    from tercet.evaluate.suites.averages import Averages
    from tercet.evaluate.suites.by_language import SetScores
    from tercet.evaluate.suites.comparison import LanguageComparison
    from tercet.evaluate.suites.pages import ReportPlace


def evaluate(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="File of examples, pairs of texts with a score, or labelled texts, a folder in "
            "the layout of BEIR or FlagEmbedding, or a folder of such sets.",
            callback=local_inputs,
        ),
    ] = None,
    *,
    model: ModelOption,
    compare_with: CompareWithOption = None,
    bm25: Annotated[
        bool,
        typer.Option(help="Compare with a baseline of shared words too.", rich_help_panel=MEASURE),
    ] = True,
    out: Annotated[
        Path | None,
        out_option("Folder for scores, pictures and report; measured sets are kept there."),
    ] = None,
    json: JsonOption = None,
    split: SplitOption = None,
    mteb: Annotated[
        list[str] | None,
        typer.Option(
            help="Task of mteb instead of DATA, or beir, miracl or miracl-o. Repeat for more.",
            rich_help_panel=DATA,
        ),
    ] = None,
    per_label: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Learn from at most this many texts of each label.",
            rich_help_panel=DATA,
        ),
    ] = None,
    seen: Annotated[
        list[str] | None,
        typer.Option(
            help="Language of the training data, for means of seen and unseen ones. Repeat "
            "for more.",
            rich_help_panel=DATA,
        ),
    ] = None,
    query_field: QueryFieldOption = None,
    positive_field: PositiveFieldOption = None,
    negative_field: NegativeFieldOption = None,
    kind: KindOption = None,
    kind_weight: KindWeightOption = None,
    protocol: Annotated[
        Literal["exact", "paper", "reference"] | None,
        typer.Option(
            metavar="CHOICE",
            help="How sums of kinds are searched. exact: all documents; paper, reference: as for "
            "BGE-M3. Default: exact, unless it takes very long.",
            rich_help_panel=VECTORS,
        ),
    ] = None,
    dims: WidthsOption = None,
    store_as: StoreAsOption = "float32",
    compressed: Annotated[
        bool,
        typer.Option(
            "--compressed",
            help="Measure what smaller vectors lose: each --dims, stored in each way.",
            rich_help_panel=VECTORS,
        ),
    ] = False,
    factor: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --compressed: candidates for each place that binary+int8 scores again. "
            "Default: 4.",
            rich_help_panel=VECTORS,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="With --compressed: metric such as recall@100. Default: ndcg@10.",
            rich_help_panel=VECTORS,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Use the model's prompts for this task. Default: the task of the data.",
            rich_help_panel=READING,
        ),
    ] = None,
    prompts: Annotated[
        bool,
        typer.Option(help="Put the model's prompts before texts.", rich_help_panel=READING),
    ] = True,
    attention: AttentionOption = None,
    pooling: PoolOption = None,
    echo: EchoOption = False,
    cls_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Put a start token before each run of this many tokens (MCLS).",
            rich_help_panel=READING,
        ),
    ] = None,
    query_tokens: QueryTokensOption = None,
    document_tokens: DocumentTokensOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Measure how well a model finds the right documents, with 95 % intervals.

    A model with several kinds of vectors is measured by each kind and by every weighted sum. For
    queries with answers instead of judged documents, answer@20 is the share of queries whose first
    20 documents contain an answer.

    Pairs with text1, text2 and score: correlation of cosines with the scores. Texts with a label:
    accuracy of a classifier learned from records whose split is train and measured on those whose
    split is test; without a split, quality of clusters.

    Of a folder of sets, such as de.jsonl and ko-en/, every set is measured, and means over
    languages and families are printed.

    Examples:
        tercet eval test.jsonl --model runs/mine/model --compare-with minilm
        tercet eval test.jsonl --model runs/mine/model --compressed --dims 256 --out runs/sizes
    """
    from tercet.evaluate.sets.location import sets_in
    from tercet.evaluate.suites.comparison import (
        EVALUATION,
        ComparisonOptions,
        compare,
        compare_by_language,
    )
    from tercet.evaluate.suites.pages import (
        write_language_report,
        write_set_report,
        write_tasks_report,
    )
    from tercet.evaluate.suites.suite import open_set

    if task is not None and not prompts:
        raise RecipeError("--task and --no-prompts exclude each other; give one of them")
    if (data is None) == (mteb is None):
        raise RecipeError("give either data to measure on, or --mteb with a task")
    shown = Figures(json)
    given = [data, model, *(compare_with or ())]
    check_files(given, json=shown.file)
    if out is not None:
        check_output(out, given, EVALUATION)
    names = known_models(model, compare_with)
    how = {"attention": attention, "pooling": pooling, "echo": echo, "cls_every": cls_every}
    limits = {"query_tokens": query_tokens, "document_tokens": document_tokens}
    machine = {"device": device, "batch_tokens": batch_tokens}
    load_model = partial(load, dtype=dtype, **machine, **how, **limits)
    codes = None if store_as == "float32" else store_as
    of_one_set = {
        "kind": kind,
        "kind-weight": kind_weight,
        "protocol": protocol,
        "per-label": per_label,
    }
    of_fields = {
        "query-field": query_field,
        "positive-field": positive_field,
        "negative-field": negative_field,
    }
    fields = fields_of(query_field, positive_field, negative_field)
    of_sizes = {"factor": factor, "metric": metric}
    if compressed:
        of_others = {**of_one_set, "seen": seen, "mteb": mteb, "store-as": codes}
        _refuse_ignored("--compressed", {**of_others, "compare-with": compare_with})
        if data is None or sets_in(data):
            raise RecipeError(f"--compressed needs a single set; {data} is a folder of sets")
        _measure_sizes(
            *(load_model, model, data, fields, task, split),
            *(dims, metric or "ndcg@10", factor, prompts),
            *(seed, shown, out),
        )
        return
    _refuse_ignored("an evaluation without --compressed", of_sizes)
    width = _one(dims)
    if data is None or mteb:
        of_data = {**of_one_set, "seen": seen, "task": task, "split": split}
        _refuse_ignored("--mteb", {**of_data, "store-as": codes, **of_fields})
        record = _measure_tasks(
            names, mteb or (), load_model, dims=width, prompts=prompts, shown=shown
        )
        _report(out, "tasks of mteb", partial(write_tasks_report, record=record))
        return
    if locations := sets_in(data):
        _refuse_ignored("a folder of sets", {**of_one_set, **of_fields})
    else:
        _refuse_ignored("a single set", {"seen": seen})
    options = ComparisonOptions(
        task=task,
        prompts=prompts,
        baselines=bm25,
        split=split,
        dims=width,
        precision=codes,
        kinds=in_order(kind),
        weights=changed_weights(kind_weight),
        protocol=protocol,
        seen=seen,
        keep=out,
        seed=seed,
    )
    if locations:
        found = compare_by_language(names, load_model, locations, options)
        _show_languages(found, shown)
        write = partial(write_language_report, found=found)
    else:
        examined = open_set(data, split=split, fields=fields, per_label=per_label, seed=seed)
        if examined.category in ("Classification", "Clustering"):
            require_package("sklearn", f"{examined.category.lower()} of texts", "probe")
        found = compare(names, load_model, examined, options)
        shown.print(found.size)
        _show_figures(found.metrics, found.figures, found.differences, found.title, shown)
        write = partial(write_set_report, found=found)
    shown.write(found.record(data))
    _report(out, data, write)


def _report(out: Path | None, data: Path | str, write: "Callable[[ReportPlace], Path]") -> None:
    """Write the report of an evaluation into the folder of --out, if any, and say where it is."""
    if out is None:
        return
    from tercet.evaluate.suites.comparison import EVALUATION
    from tercet.evaluate.suites.pages import ReportPlace

    mark(out, EVALUATION)
    say(f"report: {write(ReportPlace(out, data, COMMAND.get(), say))}")


def _one(dims: list[int] | None) -> int | None:
    """Return the only width of --dims."""
    if len(dims or ()) > 1:
        raise RecipeError("several --dims are for --compressed; give one, or add --compressed")
    return dims[0] if dims else None


def _refuse_ignored(what: str, given: Mapping[str, Any]) -> None:
    if ignored := [name for name, value in given.items() if value is not None]:
        raise RecipeError(f"--{ignored[0]} does not apply to {what}; remove it")


def _show_figures(
    metrics: Sequence[str],
    figures: "Mapping[str, Mapping[str, Interval]]",
    differences: "Mapping[str, Mapping[str, Interval]]",
    title: str,
    shown: Figures,
) -> None:
    table = columns("model", *metrics)
    for name, row in figures.items():
        table.add_row(name, *map(str, row.values()))
    shown.print(table)
    if differences:
        gains = columns(title, *metrics)
        for name, row in differences.items():
            gains.add_row(name, *(gain.signed() for gain in row.values()))
        shown.print(gains)


def _show_languages(found: "LanguageComparison", shown: Figures) -> None:
    _show_sets(found, shown)
    _show_averages(found, shown)
    if any(each.axis == "mixed" for each in found.first):
        _show_bias(found, shown)
    unknown = [each.name for each in found.first if each.axis == "unknown"]
    if unknown:
        say(
            f"{', '.join(unknown)}: of unknown language, so left out of all averages; name the "
            'file by its language (de.jsonl, ko-en/), or add "lang" to its records'
        )


def _show_sets(found: "LanguageComparison", out: Figures) -> None:
    from tercet.evaluate.report.intervals import interval
    from tercet.evaluate.suites.comparison import main_scores

    head = ("set", "axis", "languages", "queries", "nDCG@10", "Recall@100")
    table = columns(*head, *(f"minus {name}" for name in found.others))
    for each in found.first:
        figure = interval(main_scores(each), seed=found.options.seed)
        recall = f"{each.scores['recall@100'].mean():.3f}"
        row = (each.name, each.axis, each.languages, f"{len(each.langs):,}", str(figure), recall)
        table.add_row(*row, *(found.difference(each, name).signed() for name in found.others))
    out.print(table)


def _show_averages(found: "LanguageComparison", out: Figures) -> None:
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
            out.print(shown)


def _cells(found: "Averages", *, signed: bool) -> dict[str, str]:
    return {
        row: f"{figure.signed() if signed else figure} {lang}".rstrip()
        for row, figure, lang in found.rows()
    }


def _show_bias(found: "LanguageComparison", out: Figures) -> None:
    """Print whether documents in the query's own language displace those that answer it."""
    head = ("mixed set", "queries in", "nDCG@10", "answer in own language", "in another")
    bias = ("first 10 in own language", "corpus", "more than its share")
    table = columns("system", *head, *bias)
    for name, sets in found.scores.items():
        for each in (one for one in sets if one.axis == "mixed"):
            langs = sorted(set(each.langs)) if sets is found.first else ()
            for lang in (None, *langs):
                table.add_row(name, *_bias_row(each, lang, found.options.seed))
    out.print(table)


def _bias_row(each: "SetScores", lang: str | None, seed: int) -> list[str]:
    from tercet.evaluate.suites.averages import language_bias
    from tercet.evaluate.suites.suite import MAIN

    row = [each.name, lang or "all"]
    found = language_bias(each, MAIN, lang=lang, seed=seed)
    if found is None:
        return [*row, "nothing was found"]
    figures = [str(it) if it.queries else "" for it in (found.figure, found.own, found.other)]
    return [*row, *figures, f"{found.same:.3f}", f"{found.chance:.3f}", found.bias.signed()]


def _measure_tasks(
    names: Sequence[str],
    tasks: Sequence[str],
    load_model: Callable[[str], Any],
    *,
    dims: int | None,
    prompts: bool,
    shown: Figures,
) -> dict[str, Any]:
    from tercet.evaluate.measures.prompts import drop_prompts
    from tercet.evaluate.measures.retrieval import conditions, versions
    from tercet.evaluate.suites.mteb import as_mteb, named_tasks, run_tasks

    require_package("mteb", "a task of mteb", "mteb")
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
        if shown.file is not None:  # after each model: a later one may take hours
            shown.write(record)
    if table.row_count:
        shown.print(table)
    if shown.as_json:
        shown.write(record)
    return record


# ---- small vectors -------------------------------------------------------------------------------


def _measure_sizes(
    load_model: Callable[[str], Any],
    model: str,
    data: Path,
    fields: "ExampleFields | None",
    task: str | None,
    split: str | None,
    dims: list[int] | None,
    metric: str,
    factor: int | None,
    prompts: bool,
    seed: int,
    shown: Figures,
    out: Path | None,
) -> None:
    """Measure every way to store the vectors of documents, and show it.

    Texts are encoded once. The ways are compared with all coordinates in float32 on the same
    queries.
    """
    from tercet.evaluate.measures.prompts import drop_prompts, known_task, task_names
    from tercet.evaluate.measures.retention import chosen_dims, retention
    from tercet.evaluate.measures.retrieval import conditions, depth_of
    from tercet.evaluate.sets.retrieval_set import RetrievalSet
    from tercet.evaluate.suites.pages import sizes_record, write_sizes_report
    from tercet.rank.coded import FACTOR

    depth_of(metric)  # raises for an unknown metric before the work
    examined = RetrievalSet.from_path(data, split, fields)
    embedder = load_model(model)
    if not prompts:
        drop_prompts(embedder)
    if task is not None:
        embedder.settings.prompt("query", task)  # raises for an unknown task
    names = task_names(data, examples=not data.is_dir(), fields=fields)
    found = retention(
        embedder,
        examined,
        task=task or known_task(embedder.settings, names),
        dims=chosen_dims(embedder, dims),
        names=(metric,),
        factor=factor or FACTOR,
        progress=True,
    )
    shown.print(examined.size)
    _show_sizes(found, metric, seed, shown)
    if learned := dict.fromkeys(str(each.dims) for each in found if each.learned):
        say(
            f"the ranges of codes of {', '.join(learned)} coordinates were learned from the "
            "documents of this set, never from its queries; save some with the model: "
            "tercet tune codes"
        )
    about = {"model": str(model), "metric": metric, "seed": seed}
    shown.write(sizes_record(found, data=data, **about))
    facts = conditions(embedder)
    _report(out, data, partial(write_sizes_report, found=found, conditions=facts, **about))


def _show_sizes(found: "Sequence[Retained]", metric: str, seed: int, shown: Figures) -> None:
    full = found[0]
    best = full.result.mean(metric)
    table = columns("coordinates", "stored as", "bytes", metric, "minus the first", "kept")
    for each in found:
        value = each.result.interval(metric, seed=seed)
        loss = "" if each is full else each.minus(full, metric, seed).signed()
        share = f"{value.mean / best:.1%}" if best else ""
        table.add_row(str(each.dims), each.stored, f"{each.bytes:,}", str(value), loss, share)
    shown.print(table)
