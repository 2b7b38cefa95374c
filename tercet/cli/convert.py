"""The commands convert and decontaminate."""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from tercet.cli.help import group
from tercet.cli.options import (
    DATA,
    Figures,
    JsonOption,
    LabelFieldOption,
    NegativeFieldOption,
    PositiveFieldOption,
    QueryFieldOption,
    SeedOption,
    SplitOption,
    TestDataOption,
    WorkOption,
    fields_of,
    local_inputs,
    out_option,
)
from tercet.errors import DataError, RecipeError
from tercet.files.console import columns, count_table, say
from tercet.files.outputs import FolderKind, check_files, check_output, mark

_ROWS, _LABELS = "Rows", "Labels"  # panels
SHOWN_LABELS: Final = 20
CLEANED: Final = FolderKind("a folder of cleaned rows", shared=True, is_data=True)


RowsOut = Annotated[Path, out_option("The rows: a .jsonl or .parquet file.")]
TaskNameOption = Annotated[
    str,
    typer.Option("--task", help="Name of the task, kept in each row.", rich_help_panel=_ROWS),
]
InstructionOption = Annotated[
    str,
    typer.Option(
        help="What to do with a text, in words; it becomes the prompt.", rich_help_panel=_ROWS
    ),
]
ThresholdOption = Annotated[
    float,
    typer.Option(
        help="Overlap from which two texts count as near duplicates.", rich_help_panel=DATA
    ),
]
NegativesOption = Annotated[
    int, typer.Option(min=1, help="Maximum number of negatives of a row.", rich_help_panel=_ROWS)
]


def labels(
    file: Annotated[Path, typer.Argument(help="File of labelled texts.", callback=local_inputs)],
    task: TaskNameOption,
    instruction: InstructionOption,
    out: RowsOut,
    json: JsonOption = None,
    text_field: Annotated[
        list[str] | None,
        typer.Option(
            "--text-field",
            help="Field of a record that holds the text. Repeat to join several. Default: text.",
            rich_help_panel=DATA,
        ),
    ] = None,
    label_field: LabelFieldOption = "label",
    split: SplitOption = None,
    test_data: TestDataOption = None,
    threshold: ThresholdOption = 0.8,
    label_prefix: Annotated[
        str,
        typer.Option(
            help="Take only labels that begin like this, without this beginning.",
            rich_help_panel=_LABELS,
        ),
    ] = "",
    label_texts: Annotated[
        Path | None,
        typer.Option(
            help='JSON file with the words of labels: {"0": "sadness", ...}. Default: the labels.',
            rich_help_panel=_LABELS,
        ),
    ] = None,
    mode: Annotated[
        Literal["label", "example"] | None,
        typer.Option(
            help="Positive of a text: its label, or another text with it. Default: example for "
            "more than two labels, else label.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of rows, balanced by label. Default: a row for each text.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    negatives: NegativesOption = 7,
    lonely: Annotated[
        Literal["label", "skip"],
        typer.Option(
            help="A text without another of its label gets the words of the label, or no row.",
            rich_help_panel=_LABELS,
        ),
    ] = "label",
    seed: SeedOption = 0,
) -> None:
    r"""Make rows of texts with one or several labels each.

    The positive of a text is another text with its label, or the words of the label; negatives
    have other labels. Of a text with several labels one is drawn for its row, and no text or label
    that shares any of them becomes a negative. --text-field decides between titles and whole
    documents.

    Examples:
        tercet convert labels mails.jsonl --task mails \
            --instruction "Classify the mail by department." --out rows.jsonl
        tercet convert labels papers.jsonl --task papers --text-field title --label-field topics \
            --instruction "Name the topic of the paper." --out rows.jsonl
    """
    from tercet.curate.convert.classification import convert_labelled
    from tercet.curate.convert.conversion import Conversion
    from tercet.data.files.labelled import read_label_texts, read_labelled_texts

    shown = _checked(json, out, file, label_texts, *(test_data or []))
    words = read_label_texts(label_texts) if label_texts else None
    every = read_labelled_texts(
        file,
        text_field=text_field or "text",
        label_field=label_field,
        label_prefix=label_prefix,
    )
    texts = (text for text in every if split is None or text.split == split)
    if test_data:
        texts = _withheld(texts, lambda text: [text.text], test_data, threshold, shown)
    conversion = Conversion(task=task, instruction=instruction, negatives=negatives, seed=seed)
    converted = convert_labelled(
        texts, conversion, mode=mode, rows=rows, lonely=lonely, label_texts=words
    )
    _write(out, converted, shown)


def scores(
    file: Annotated[
        Path,
        typer.Argument(help="File with text1, text2 and score.", callback=local_inputs),
    ],
    task: TaskNameOption,
    instruction: InstructionOption,
    out: RowsOut,
    json: JsonOption = None,
    test_data: TestDataOption = None,
    threshold: ThresholdOption = 0.8,
    scale: Annotated[
        tuple[float, float] | None,
        typer.Option(
            metavar="LOWEST HIGHEST",
            help="Lowest and highest score, mapped to 0 and 5. Default: scores stay as they are.",
            rich_help_panel=_ROWS,
        ),
    ] = None,
    alike: Annotated[
        float,
        typer.Option(help="Minimum score of a pair that becomes rows.", rich_help_panel=_ROWS),
    ] = 4.0,
    unlike: Annotated[
        float, typer.Option(help="Maximum known score of a negative.", rich_help_panel=_ROWS)
    ] = 2.5,
    negatives: NegativesOption = 7,
) -> None:
    r"""Make rows of pairs of texts with a score, in both directions.

    Negatives are texts of the file that share words with the query and are not known to be similar
    to it.

    Example:
        tercet convert scores pairs.jsonl --task sts --scale 0 1 \
            --instruction "Retrieve semantically similar text." --out rows.jsonl
    """
    from tercet.curate.convert.conversion import Conversion
    from tercet.curate.convert.scored_pairs import convert_similarity
    from tercet.data.files.similarity import SimilaritySet

    shown = _checked(json, out, file, *(test_data or []))
    data = SimilaritySet.from_file(file)
    if test_data:
        texts = data.texts
        pairs = zip(data.pairs.tolist(), data.scores.tolist(), strict=True)
        scored = [(texts[first], texts[second], score) for (first, second), score in pairs]
        kept = list(_withheld(scored, lambda pair: pair[:2], test_data, threshold, shown))
        data = SimilaritySet.of(data.name, kept)
    conversion = Conversion(task=task, instruction=instruction, negatives=negatives)
    converted = convert_similarity(data, conversion, alike=alike, unlike=unlike, rescale=scale)
    _write(out, converted, shown)


def flagembedding(
    paths: Annotated[
        list[Path], typer.Argument(help="Files of rows, or folders of them; several are one set.")
    ],
    out: RowsOut,
    json: JsonOption = None,
    prompt: Annotated[
        str,
        typer.Option(help="Prompt of queries whose rows have no prompt.", rich_help_panel=_ROWS),
    ] = "",
    prompt_format: Annotated[
        str,
        typer.Option(
            help="How prompt and query are joined; \\n is a line break.", rich_help_panel=_ROWS
        ),
    ] = "{}{}",
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of rows of each file.", rich_help_panel=_ROWS),
    ] = None,
    small: Annotated[
        int,
        typer.Option(
            min=0,
            help="Files of a folder with fewer rows become one task.",
            rich_help_panel=_ROWS,
        ),
    ] = 0,
    drop: Annotated[
        int,
        typer.Option(
            min=0,
            help="Leave that task out if it has fewer rows.",
            rich_help_panel=_ROWS,
        ),
    ] = 0,
    seed: SeedOption = 0,
) -> None:
    """Make rows of FlagEmbedding's rows; what its file names and flags say is kept in each row.

    Where the name of a file or folder ends in no_in_batch_neg, documents of other rows are not used
    as negatives.

    Example:
        tercet convert flagembedding data/sts data/nq_no_in_batch_neg --out rows.jsonl
    """
    from tercet.curate.convert.flagembedding import FileLimits, convert_flag_rows, flag_set
    from tercet.data.files.sources import write_examples
    from tercet.files.progress import bar
    from tercet.models.formats.bge_m3_files import FlagRows

    shown = _checked(json, out, *paths)
    how = FlagRows(prompt=prompt, form=prompt_format.replace("\\n", "\n"), seed=seed)
    limits = FileLimits(rows=rows, small=small, drop=drop)
    chosen = flag_set(paths, limits)
    tasks: Counter[str] = Counter()

    def examples(advance: Any) -> Iterator[Any]:
        for example in convert_flag_rows(chosen, how, limits, advance):
            tasks[example.task] += 1
            yield example

    with bar("rows", sum(chosen.counts[file.path] for file in chosen.files)) as advance:
        write_examples(out, examples(advance))
    shown.print(count_table("task", "rows", tasks))
    shown.write({"rows": tasks, "left_out": chosen.left_out + how.notes})
    for reason, count in (chosen.left_out + how.notes).items():
        say(f"tercet: note: left out: {count:,} {reason}")


def arctic(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="A folder with queries.parquet, documents.parquet and labels.parquet; or files of "
            "rows (.jsonl, .parquet)."
        ),
    ],
    out: Annotated[
        Path, out_option("A .jsonl or .parquet file of rows; or, from rows, a folder of tables.")
    ],
    mined: Annotated[
        Path | None,
        typer.Option(
            help="Table with RELEVANCE; documents below 0 are negatives.", rich_help_panel=DATA
        ),
    ] = None,
    work: WorkOption = Path("runs/convert"),
    json: JsonOption = None,
) -> None:
    """Make rows of Arctic-Embed's tables of queries, documents and labels, or tables of rows.

    The input decides: a folder of tables becomes rows, files of rows become a folder of tables.

    Examples:
        tercet convert arctic tables/ --mined tables/mined.parquet --out rows.parquet
        tercet convert arctic rows.parquet --out tables/
    """
    from tercet.curate.convert.arctic import TABLES, TablesReport, examples_of_tables, write_tables
    from tercet.data.files.sources import iter_examples, write_examples

    (first, *more), shown = paths, Figures(json)
    if not first.is_dir():
        if mined is not None:
            raise RecipeError("--mined is for a folder of tables; leave it out for files of rows")
        check_files(paths, json=shown.file)
        check_output(out, paths, TABLES)
        _show_tables(write_tables(out, chain.from_iterable(map(iter_examples, paths))), shown)
        return
    if more:
        raise RecipeError(f"{more[0]}: give one folder of tables, or files of rows")
    tables = (first / f"{name}.parquet" for name in ("queries", "documents", "labels"))
    shown = _checked(json, out, mined, *tables)
    report = TablesReport()
    write_examples(out, examples_of_tables(first, report, work=work, mined=mined))
    _show_tables(report, shown)


def _about_conversions() -> None:
    r"""Make training rows of other data.

    Example:
        tercet convert labels mails.jsonl --task mails \
            --instruction "Classify the mail by department." --out rows.jsonl
    """


convert = group(
    _about_conversions,
    ("labels", labels),
    ("scores", scores),
    ("flagembedding", flagembedding),
    ("arctic", arctic),
)


def decontaminate(
    file: Annotated[
        Path,
        typer.Argument(
            help="Training rows: a file, or a folder of sources.", callback=local_inputs
        ),
    ],
    test_data: Annotated[
        list[Path],
        typer.Option(
            "--test-data",
            help="Test file or folder whose texts must not be in training data. Repeat for more.",
            callback=local_inputs,
            rich_help_panel=DATA,
        ),
    ],
    out: Annotated[Path, out_option("The rows that stay: a file, or a folder for a folder.")],
    query_field: QueryFieldOption = None,
    positive_field: PositiveFieldOption = None,
    negative_field: NegativeFieldOption = None,
    threshold: ThresholdOption = 0.8,
    json: JsonOption = None,
) -> None:
    """Remove texts of a test, and near duplicates of them, from training rows.

    A row is dropped if its query or its last positive is removed; negatives are removed one by one.
    Tests may be examples, scored pairs, labelled or plain texts, or folders in BEIR's layout. A
    folder becomes a folder of the same files, or one file if --out has an ending.

    Example:
        tercet decontaminate rows.jsonl --test-data test.jsonl --out clean.jsonl
    """
    from tercet.curate.convert.decontaminate import EvaluationTexts, Removal
    from tercet.curate.convert.decontaminate import decontaminate as cleaned
    from tercet.data.files.folders import shard_examples
    from tercet.data.files.sources import write_examples
    from tercet.files.progress import bar

    shown = Figures(json)
    check_files([file, *test_data], json=shown.file)
    outputs = _cleaned_files(file, out)
    if as_folder := file.is_dir() and not out.suffix:
        check_output(out, [file, *test_data], CLEANED)
    else:
        _checked(None, out, file, *test_data)
    index, removal = EvaluationTexts.read(test_data, threshold), Removal()
    read = partial(shard_examples, fields=fields_of(query_field, positive_field, negative_field))
    with bar("rows", None) as advance:

        def rows(shards: Sequence[Any]) -> Iterator[Any]:
            for row in cleaned(chain.from_iterable(map(read, shards)), index, removal):
                advance()
                yield row

        for path, shards in outputs:
            clean = rows(shards)
            first = next(clean, None)
            if first is not None:
                if as_folder:
                    mark(out, CLEANED)
                write_examples(path, chain([first], clean))
            elif len(outputs) > 1:
                say(f"tercet: note: {path}: not written: no row is left")
    if not removal.kept:
        raise DataError(file, None, "every row has a text of the test; nothing is left")
    _show_removal(removal, shown)
    shown.write(_removal_record(removal))


def _cleaned_files(source: Path, out: Path) -> list[tuple[Path, list[Any]]]:
    """Return each file to write, with the shards whose rows go into it."""
    from tercet.data.files.folders import find_groups
    from tercet.files.forms import rows_name

    shards = [shard for group in find_groups(source) for shard in group.shards]
    if not source.is_dir() or out.suffix:
        return [(out, shards)]
    places = (shard.path.relative_to(source).parent for shard in shards)
    return [
        (out / place / rows_name(shard.path), [shard])
        for place, shard in zip(places, shards, strict=True)
    ]


def _checked(json: Path | None, out: Path, *inputs: Path | None) -> Figures:
    """Raise, before anything is read, if a result would replace an input."""
    from tercet.files.records import known_suffix

    shown = Figures(json)
    known_suffix(out)
    check_files(inputs, out=out, json=shown.file)
    return shown


def _withheld(
    items: Any, texts_of: Any, test_data: Sequence[Path], threshold: float, shown: Figures
) -> Iterator[Any]:
    """Yield the items without a text of the tests; at the end, show what was removed."""
    from tercet.curate.convert.decontaminate import EvaluationTexts, Removal, withhold

    removal = Removal()
    index = EvaluationTexts.read(test_data, threshold)
    yield from withhold(items, texts_of, against=index, removal=removal)
    _show_removal(removal, shown)


def _write(out: Path, converted: Any, shown: Figures) -> None:
    from tercet.data.files.sources import write_examples

    rows = converted.rows
    if not rows:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in converted.skipped.items())
        raise RecipeError(f"{converted.records:,} records gave no row: {reasons or 'none'}")
    write_examples(out, rows)
    counts = {
        "records": converted.records,
        **{f"no row: {reason}": count for reason, count in converted.skipped.items()},
        "rows": len(rows),
        "negatives per row": f"{sum(len(row.negatives) for row in rows) / len(rows):.2f}",
    }
    if converted.label_instead:
        counts["rows with the label for want of another text"] = converted.label_instead
    shown.print(count_table("what", "count", counts))
    shown.write({**counts, "labels": converted.labels, "mode": converted.mode})
    if converted.labels:
        most = dict(islice(converted.labels.items(), SHOWN_LABELS))
        shown.print(count_table("label", "rows", most))
    if len(converted.labels) > SHOWN_LABELS:
        say(f"tercet: note: {len(converted.labels) - SHOWN_LABELS} smaller labels are not shown")
    if converted.mode:
        say(f"tercet: note: rows of mode {converted.mode}")


def _show_removal(removal: Any, shown: Figures) -> None:
    table = columns("found in", "field", "how", "texts")
    for (file, field, how), count in sorted(removal.texts.items()):
        table.add_row(file, field, how, f"{count:,}")
    if removal.texts:
        shown.print(table)
    gone = removal.rows - removal.kept
    say(f"tercet: note: {gone:,} of {removal.rows:,} left out for texts of the test")
    if removal.without_negatives:
        say(f"tercet: note: {removal.without_negatives:,} of them had no negative left")
    if gone > removal.rows / 2:
        say("tercet: note: more than half went; is the test made of the same texts?")


def _removal_record(removal: Any) -> dict[str, Any]:
    texts = [
        {"file": file, "field": field, "how": how, "texts": count}
        for (file, field, how), count in sorted(removal.texts.items())
    ]
    return {"rows": removal.rows, "kept": removal.kept, "texts": texts}


def _show_tables(report: Any, shown: Figures) -> None:
    table = columns("queries", "rows", "without a label", "negatives")
    counts = (report.queries, report.rows, report.unanswered, report.negatives)
    table.add_row(*(f"{count:,}" for count in counts))
    shown.print(table)
    shown.write(dict(zip(("queries", "rows", "without_label", "negatives"), counts, strict=True)))
