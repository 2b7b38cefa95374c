"""Training examples for long documents: a model writes questions about drawn passages.

As in arXiv 2402.03216, sec. 3.1 and appendix A.2: a passage is drawn from a long document, a
language model asks one question about it, and the pair is (question, *whole* document). The paper
leaves open the parser, the consistency check and the positions of passages.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

import pyarrow as pa

from tercet.curate.synthesis.answers import AnswerLog, answer_log
from tercet.curate.synthesis.consistency import Candidate, Consistency, ranks
from tercet.curate.synthesis.generators import Generator, Prompt, QuestionPrompt
from tercet.curate.synthesis.passages import (
    THIRDS,
    Passage,
    PassageSampling,
    draw_documents,
    draw_passages,
    seed_of,
)
from tercet.curate.synthesis.questions import REASONS, parse_question, question_form
from tercet.data.files.documents import Document
from tercet.data.files.examples import example_record
from tercet.data.files.sources import write_records
from tercet.errors import ModelError, RecipeError
from tercet.files.progress import bar
from tercet.files.records import known_suffix
from tercet.types import Example

FAILING: Final = 20  # consecutive failed calls after which the run stops
CROWD: Final = 10  # documents per passing rank, below which the check is too easy

# Provenance of each example. Not "prompt", which has another meaning in FlagEmbedding's files.
PROVENANCE: Final[Mapping[str, pa.DataType]] = {
    "document_id": pa.string(),
    "passage_start": pa.int64(),
    "passage_end": pa.int64(),
    "passage_position": pa.float64(),
    "generator": pa.string(),
    "prompt_digest": pa.string(),
    "seed": pa.int64(),
}

_notes = logging.getLogger("tercet")

DocumentReader: TypeAlias = Callable[[], Iterator[Document]]
"""Reads all documents; called once for each pass over them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthesis:
    """Settings of a synthesis."""

    task: str
    sampling: PassageSampling = field(default_factory=PassageSampling)
    prompt: QuestionPrompt = field(default_factory=QuestionPrompt)
    check: Consistency | None = None


@dataclass(slots=True, kw_only=True)
class SynthesisReport:
    """Counts of a synthesis.

    ``passages`` = failed + refused + duplicates + inconsistent + kept; for failed passages, the
    same command requests an answer again.
    """

    documents: int = 0  # drawn
    unusable: int = 0  # drawn, but without a passage of prose
    passages: int = 0
    answered_before: int = 0
    answered: int = 0  # by this run
    failures: Counter[str] = field(default_factory=Counter)
    refused: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    duplicates: int = 0
    inconsistent: int = 0
    checked_among: int = 0  # documents; 0 without a check
    kept: int = 0
    asked_thirds: list[int] = field(default_factory=lambda: [0] * THIRDS)
    kept_thirds: list[int] = field(default_factory=lambda: [0] * THIRDS)
    seconds: float = 0.0  # of waiting for answers

    @property
    def failed(self) -> int:
        """Calls that failed."""
        return self.failures.total()


@dataclass(frozen=True, slots=True)
class _Question:
    text: str
    passage: Passage


def log_path(out: Path) -> Path:
    """Return the file with the raw answers for an output file."""
    return out.with_suffix(".log.jsonl")


def synthesize(
    documents: DocumentReader, out: Path, generator: Generator, synthesis: Synthesis
) -> SynthesisReport:
    """Write examples of questions and the whole documents that they were asked about.

    Raw answers are kept in ``OUT.log.jsonl``, which only its owner may read; so is ``out``, where
    an endpoint answered. A run that was killed continues from there, and
    another check or more documents request no answer twice. Of duplicate questions the first is
    kept. If no question is left, no file is written.

    Raises:
        RecipeError: if no passage can be drawn, or the log's answers depend on other settings.
        DataError: if a document cannot be read.
        ModelError: if the generator does not work.
        StorageError: if the disk refuses; answers so far are kept.
    """
    known_suffix(out)
    sampling = synthesis.sampling
    about = {
        "generator": dict(generator.about),
        "prompt_digest": synthesis.prompt.digest,
        "seed": sampling.seed,
        "shortest_passage": sampling.least,
        "longest_passage": sampling.most,
    }
    report = SynthesisReport()
    plan = _Plan.of(documents, synthesis)
    plan.count(report)
    with answer_log(log_path(out), about) as log:
        _ask(plan, generator, log, report)
        questions = _parsed(plan, log, report)
        if synthesis.check is not None:
            questions = _consistent(plan, questions, synthesis.check, report)
        report.kept = len(questions)
        for question in questions:
            report.kept_thirds[question.passage.third] += 1
        if questions:
            records = _records(plan, questions, str(generator.about["model"]))
            write_records(out, records, PROVENANCE, private="url" in generator.about)
    return report


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """The drawn documents and passages. Each pass reads all documents, one at a time."""

    documents: DocumentReader
    synthesis: Synthesis
    ranks: Mapping[str, int]  # of the drawn documents, by id

    @classmethod
    def of(cls, documents: DocumentReader, synthesis: Synthesis) -> "_Plan":
        sampling, check = synthesis.sampling, synthesis.check
        count = sampling.documents
        if count is not None and check is not None:
            count = max(count, check.among)
        return cls(documents, synthesis, draw_documents(documents(), sampling, count))

    def each(self) -> Iterator[tuple[Document, list[Passage], bool]]:
        """Yield each drawn document, its passages, and whether questions are asked about them."""
        sampling = self.synthesis.sampling
        for document in self.documents():
            rank = self.ranks.get(document.id)
            if rank is not None:
                asked = sampling.documents is None or rank < sampling.documents
                yield document, draw_passages(document, sampling, rank), asked

    def passages(self) -> Iterator[Passage]:
        """Yield the passages that questions are asked about."""
        for _, passages, asked in self.each():
            if asked:
                yield from passages

    def count(self, report: SynthesisReport) -> None:
        """Count the documents and passages that questions are asked about."""
        with bar("draw", len(self.ranks)) as advance:
            for _, passages, asked in self.each():
                advance()
                report.documents += asked
                report.unusable += asked and not passages
                for passage in passages if asked else ():
                    report.passages += 1
                    report.asked_thirds[passage.third] += 1
        if not report.passages:
            sampling = self.synthesis.sampling
            raise RecipeError(
                f"no document has a passage of {sampling.least} to {sampling.most} characters of "
                "prose; allow shorter ones, or give longer documents"
            )


def _ask(plan: _Plan, generator: Generator, log: AnswerLog, report: SynthesisReport) -> None:
    """Request an answer for each passage without one."""
    report.answered_before = sum(log.get(passage) is not None for passage in plan.passages())
    waiting: dict[int, Passage] = {}

    def prompts() -> Iterator[Prompt]:
        missing = (passage for passage in plan.passages() if log.get(passage) is None)
        for number, passage in enumerate(missing):
            waiting[number] = passage
            seed = seed_of(plan.synthesis.sampling.seed, passage.document, passage.start)
            yield Prompt(plan.synthesis.prompt.text(passage), seed)

    model, started = generator.about["model"], time.monotonic()
    in_a_row = 0
    with (
        bar("ask", report.passages, report.answered_before) as advance,
        closing(generator.answers(prompts())) as answers,
    ):
        for number, answer in answers:
            log.add(waiting.pop(number), answer)
            if answer.failure is None:
                report.answered, in_a_row = report.answered + 1, 0
            else:
                report.failures[answer.failure] += 1
                in_a_row += 1
            advance(note=f"{report.failed:,} failed" if report.failed else "")
            if in_a_row == FAILING:
                raise ModelError(
                    f"{model}: {FAILING} calls in a row failed, the last one with: "
                    f"{answer.failure}; answers so far are kept in {log.path}: solve the problem, "
                    "and give the same command again"
                )
    report.seconds = time.monotonic() - started


def _parsed(plan: _Plan, log: AnswerLog, report: SynthesisReport) -> list[_Question]:
    """Return the usable questions without duplicates."""
    found: dict[str, _Question] = {}
    for passage in plan.passages():
        answer = log.get(passage)
        if answer is None:
            continue
        parsed = parse_question(answer, passage.text)
        if parsed.refusal:
            report.refused[parsed.refusal] += 1
        elif question_form(parsed.question) in found:
            report.duplicates += 1
        else:
            found[question_form(parsed.question)] = _Question(parsed.question, passage)
    return list(found.values())


def _consistent(
    plan: _Plan, questions: Sequence[_Question], check: Consistency, report: SynthesisReport
) -> list[_Question]:
    """Return the questions that find their document."""
    of_document = _by_document(questions)
    found: list[_Question] = []

    def candidates() -> Iterator[Candidate]:
        for document, passages, asked in plan.each():
            mine = of_document.get(document.id, []) if asked else []
            whole = check.against == "documents"
            texts = [document.text] if whole else [passage.text for passage in passages]
            if passages:
                report.checked_among += 1
                yield Candidate(document.id, texts, [question.text for question in mine])

    for name, places in ranks(candidates(), check, len(plan.ranks)):
        for question, place in zip(of_document.get(name, []), places, strict=True):
            if place <= check.top:
                found.append(question)
            else:
                report.inconsistent += 1
    if report.checked_among < CROWD * check.top:
        _notes.warning(
            f"questions were checked among only {report.checked_among} documents, of which the "
            f"best {check.top} pass; give more documents, or a smaller --top"
        )
    return found


def _records(
    plan: _Plan, questions: Sequence[_Question], generator: str
) -> Iterator[dict[str, Any]]:
    of_document = _by_document(questions)
    synthesis = plan.synthesis
    for document, _, _ in plan.each():
        for question in of_document.get(document.id, []):
            passage = question.passage
            example = Example(question.text, (document.text,), task=synthesis.task)
            yield {
                **example_record(example),
                "document_id": document.id,
                "passage_start": passage.start,
                "passage_end": passage.end,
                "passage_position": round(passage.position, 4),
                "generator": generator,
                "prompt_digest": synthesis.prompt.digest,
                "seed": synthesis.sampling.seed,
            }


def _by_document(questions: Sequence[_Question]) -> dict[str, list[_Question]]:
    found: dict[str, list[_Question]] = {}
    for question in questions:
        found.setdefault(question.passage.document, []).append(question)
    return found
