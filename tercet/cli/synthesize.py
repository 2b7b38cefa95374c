"""The command synthesize: questions about documents, written by a language model."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tercet.cli.options import (
    MACHINE,
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
    Figures,
    IdFieldOption,
    JsonOption,
    SeedOption,
    SplitOption,
    TextFieldOption,
    TitleFieldOption,
    WorkOption,
    load,
    local_inputs,
    model_names,
    model_option,
    out_option,
)
from tercet.data.files.documents import Fields, read_documents
from tercet.errors import RecipeError
from tercet.files.console import columns, count_table, say, shortened
from tercet.files.outputs import check_files

if TYPE_CHECKING:
    from tercet.curate.synthesis.question_pairs import SynthesisReport

_PASSAGES, _QUESTIONS = "Passages", "Questions"  # panels
_CHECK, _ENDPOINT = "Check of the questions", "Endpoint"
_SHOWN_FAILURES = 5


def synthesize(
    file: Annotated[
        Path,
        typer.Argument(help="File of documents (.txt has one a line).", callback=local_inputs),
    ],
    model: Annotated[
        str, model_option("Model that writes: a causal language model; with --url its name there.")
    ],
    out: Annotated[Path, out_option("The examples: a .jsonl or .parquet file.")],
    json: JsonOption = None,
    work: WorkOption = Path("runs/mining"),
    text_field: TextFieldOption = "text",
    title_field: TitleFieldOption = "title",
    id_field: IdFieldOption = "id",
    split: SplitOption = None,
    documents: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of documents, drawn at random.", rich_help_panel=_PASSAGES
        ),
    ] = 1000,
    samples: Annotated[
        int, typer.Option(min=1, help="Passages of each document.", rich_help_panel=_PASSAGES)
    ] = 1,
    min_characters: Annotated[
        int,
        typer.Option(help="Minimum length of a passage.", rich_help_panel=_PASSAGES),
    ] = 300,
    max_characters: Annotated[
        int,
        typer.Option(help="Maximum length of a passage.", rich_help_panel=_PASSAGES),
    ] = 1500,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task of the examples. Default: the name of the file.", rich_help_panel=_QUESTIONS
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="File with a prompt, in which {passage} stands for the passage.",
            rich_help_panel=_QUESTIONS,
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(
            help="Language of the documents, named in the prompt. Default: not named.",
            rich_help_panel=_QUESTIONS,
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the answers.", rich_help_panel=_QUESTIONS)
    ] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(
            help="Share of the probability that tokens are drawn from.", rich_help_panel=_QUESTIONS
        ),
    ] = 0.95,
    max_tokens: Annotated[
        int, typer.Option(help="Maximum length of an answer in tokens.", rich_help_panel=_QUESTIONS)
    ] = 64,
    check_model: Annotated[
        str | None,
        typer.Option(
            help="Embedder that must find the document of each question. Default: no check.",
            rich_help_panel=_CHECK,
            autocompletion=model_names,
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(help="Worst rank of the document that passes.", rich_help_panel=_CHECK)
    ] = 1,
    among: Annotated[
        int, typer.Option(help="Number of documents that are ranked.", rich_help_panel=_CHECK)
    ] = 1000,
    find_in: Annotated[
        Literal["passages", "documents"],
        typer.Option(
            help="What is ranked: the passages that were asked about, or whole documents.",
            rich_help_panel=_CHECK,
        ),
    ] = "passages",
    url: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-compatible endpoint, such as http://host:8000/v1. Default: the model runs "
            "here.",
            rich_help_panel=_ENDPOINT,
        ),
    ] = None,
    key_variable: Annotated[
        str | None,
        typer.Option(
            help="Environment variable with the endpoint's key.", rich_help_panel=_ENDPOINT
        ),
    ] = None,
    calls: Annotated[
        int, typer.Option(min=1, help="Calls at the same time.", rich_help_panel=_ENDPOINT)
    ] = 4,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds until a call counts as failed.", rich_help_panel=_ENDPOINT),
    ] = 60.0,
    retries: Annotated[
        int,
        typer.Option(help="How often a failed call is repeated.", rich_help_panel=_ENDPOINT),
    ] = 4,
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="Prompts that a local model reads together.", rich_help_panel=MACHINE
        ),
    ] = 8,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Let a language model write questions about passages of documents, as training examples.

    An example is a question and the whole document. Raw answers are kept beside --out, in a file
    that ends in .log.jsonl: the same command continues a killed run and repeats failed calls,
    and with another --check-model no answer is requested twice.

    Example:
        tercet synthesize docs.jsonl --model smollm2 --check-model minilm --out questions.jsonl
    """
    from tercet.curate.synthesis.consistency import Consistency
    from tercet.curate.synthesis.endpoint import Calls, EndpointGenerator
    from tercet.curate.synthesis.generators import QuestionPrompt, TokenSampling
    from tercet.curate.synthesis.passages import PassageSampling
    from tercet.curate.synthesis.question_pairs import Synthesis, log_path
    from tercet.curate.synthesis.question_pairs import synthesize as run_synthesis
    from tercet.files.records import known_suffix

    known_suffix(out)
    shown = Figures(json)
    for path in (out, log_path(out)):
        check_files([file, prompt_file, model, check_model], out=path, json=shown.file)
    prompt = QuestionPrompt(language=language)
    if prompt_file is not None:
        prompt = QuestionPrompt.of_file(prompt_file, language)
    passages = PassageSampling(
        documents=documents, samples=samples, least=min_characters, most=max_characters, seed=seed
    )
    tokens = TokenSampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens)
    if url is not None:
        how = Calls(workers=calls, timeout_seconds=timeout, retries=retries)
        generator = EndpointGenerator(url, model, tokens, key_variable=key_variable, calls=how)
    elif key_variable is not None:
        raise RecipeError("--key-variable is for an endpoint; give its --url as well")
    else:
        generator = _local(model, tokens, batch, dtype, device)
    consistency = None
    if check_model is not None:
        embedder = load(check_model, dtype, device=device, batch_tokens=batch_tokens)
        consistency = Consistency(
            embedder=embedder, top=top, among=among, against=find_in, work=work
        )
    fields = Fields(text=text_field, title=title_field, id=id_field)
    report = run_synthesis(
        partial(read_documents, file, fields, split=split),
        out,
        generator,
        Synthesis(task=task or out.stem, sampling=passages, prompt=prompt, check=consistency),
    )
    _show(report, shown, checked=check_model is not None)
    say(f"raw answers stay in {log_path(out)}: another --check-model needs no new ones")
    if not report.kept:
        raise RecipeError(f"{out}: not written: no question is left; the table says why")


def _local(model: str, tokens: Any, batch: int, dtype: str | None, device: str | None) -> Any:
    import torch

    from tercet.curate.synthesis.generators import LocalGenerator
    from tercet.models.devices import find_device, number_type

    place = find_device(device)
    kind = getattr(torch, dtype or number_type(place))
    return LocalGenerator(model, tokens, batch=batch, dtype=kind, device=str(place))


def _show(report: "SynthesisReport", shown: Figures, *, checked: bool) -> None:
    counts = {
        "documents drawn": report.documents,
        **({"without a passage": report.unusable} if report.unusable else {}),
        "passages": report.passages,
        "answered before": report.answered_before,
        "answered now": report.answered,
        "failed calls": report.failed,
        **{f"refused: {reason}": count for reason, count in report.refused.items()},
        "duplicates": report.duplicates,
    }
    if checked:
        counts[f"inconsistent, among {report.checked_among:,}"] = report.inconsistent
    counts["kept"] = report.kept
    thirds = columns("third of the document", "asked", "kept")
    for name, asked, kept in zip(
        ("first", "second", "last"), report.asked_thirds, report.kept_thirds, strict=True
    ):
        thirds.add_row(name, f"{asked:,}", f"{kept:,}")
    shown.print(count_table("what", "count", counts))
    shown.print(thirds)
    shown.write(counts)
    if report.answered:
        say(f"{report.answered:,} answers in {report.seconds:.0f} s")
    for failure, count in report.failures.most_common(_SHOWN_FAILURES):
        say(f"tercet: note: {count:,} calls failed: {shortened(failure)}")
