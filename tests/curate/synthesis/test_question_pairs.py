import json
import os
import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tercet.curate.synthesis.answers import answer_log
from tercet.curate.synthesis.consistency import Candidate, Consistency, ranks
from tercet.curate.synthesis.generators import PROMPT, Answer, Prompt, QuestionPrompt
from tercet.curate.synthesis.passages import Passage, PassageSampling
from tercet.curate.synthesis.question_pairs import (
    FAILING,
    Synthesis,
    SynthesisReport,
    log_path,
    synthesize,
)
from tercet.curate.synthesis.questions import REASONS
from tercet.data.files.documents import Document
from tercet.data.files.sources import iter_examples, open_source
from tercet.errors import DataError, ModelError, RecipeError, StorageError
from tercet.models.embedder import Embedder
from tests.toy import SENTENCES, small_disk

SMALL = PassageSampling(least=60, most=200)


@dataclass
class Scripted:
    """A generator that answers by a function of the prompt, and remembers what it was asked."""

    reply: Callable[[str], str | Answer]
    about: dict[str, Any] = field(default_factory=lambda: {"model": "scripted"})
    asked: list[Prompt] = field(default_factory=list)
    stop_after: int | None = None

    def answers(self, prompts: Iterable[Prompt]):
        for number, prompt in enumerate(prompts):
            if self.stop_after == number:
                raise KeyboardInterrupt
            self.asked.append(prompt)
            found = self.reply(prompt.text)
            yield number, found if isinstance(found, Answer) else Answer(found)


def about_the_first_word(prompt: str) -> str:
    """A good question, different for each document."""
    return f"Question: What is said of the {first_word(prompt)} by its makers?"


def first_word(prompt: str) -> str:
    found = re.search(r"word\w+", prompt)
    assert found is not None
    return found[0]


def documents(count: int = 9) -> list[Document]:
    """Each has its own word in each paragraph."""
    found = []
    for n in range(count):
        word = "word" + "abcdefghijklmnopqrstuvwxyz"[n] * 3
        parts = [f"The {word} can {SENTENCES[(n + i) % 12]}, on part {i}." for i in range(12)]
        found.append(Document(f"d{n}", "\n\n".join(parts), title=f"page of {word}"))
    return found


def run(
    out: Path,
    generator: Scripted,
    *,
    docs: list[Document] | None = None,
    sampling: PassageSampling = SMALL,
    **how: Any,
) -> SynthesisReport:
    given = documents() if docs is None else docs
    synthesis = Synthesis(task="pages", sampling=sampling, **how)
    return synthesize(lambda: iter(given), out, generator, synthesis)


def balanced(report: SynthesisReport) -> bool:
    """Each passage is counted once."""
    lost = report.failed + sum(report.refused.values()) + report.duplicates + report.inconsistent
    answers = report.answered + report.answered_before
    return report.passages == lost + report.kept == answers + report.failed


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_an_example_is_a_question_and_the_whole_document_with_its_provenance(tmp_path, ending):
    out = tmp_path / f"questions.{ending}"
    generator = Scripted(about_the_first_word)
    report = run(out, generator)
    texts = {document.id: document.text for document in documents()}
    found = list(iter_examples(out))
    assert len(found) == report.kept == 9 and balanced(report)
    assert {example.task for example in found} == {"pages"}
    assert {example.query_prompt for example in found} == {None}
    rows = (
        pq.read_table(out).to_pylist()
        if ending == "parquet"
        else [json.loads(line) for line in out.read_text().splitlines()]
    )
    for row, example in zip(rows, found, strict=True):
        text = texts[row["document_id"]]
        assert example.positives == (text,)
        passage = text[row["passage_start"] : row["passage_end"]]
        assert 60 <= len(passage) <= 200
        assert example.query == f"What is said of the {first_word(passage)} by its makers?"
        middle = (row["passage_start"] + row["passage_end"]) / 2 / len(text)
        assert row["passage_position"] == pytest.approx(middle, abs=1e-4)
        about = (row["generator"], row["prompt_digest"], row["seed"])
        assert about == ("scripted", QuestionPrompt().digest, 0)
    assert len(open_source(out)) == 9  # what training opens
    assert report.asked_thirds == report.kept_thirds == [3, 3, 3]


def test_the_prompt_holds_the_passage_the_title_and_the_language():
    passage = Passage("d", "a  {passage}\ntitle", 0, 9, "Of {title} and {language}.", 0.5)
    text = QuestionPrompt("{title}|{language}|{passage}", "Korean").text(passage)
    assert text.endswith("|Korean|Of {title} and {language}.")
    asked = QuestionPrompt().text(Passage("d", "ls", 0, 9, "It lists.", 0.5))
    assert 'called "ls"' in asked and "It lists." in asked and "{" not in asked
    untitled = QuestionPrompt().text(Passage("d", " ", 0, 9, "It lists.", 0.5))
    assert "called" not in untitled


def test_prompts_differ_in_their_digest_and_a_file_needs_a_place_for_the_passage(tmp_path):
    assert (
        len(
            {
                QuestionPrompt().digest,
                QuestionPrompt(language="Korean").digest,
                QuestionPrompt("{passage}").digest,
            }
        )
        == 3
    )
    (tmp_path / "prompt.txt").write_text("Ask.\n")
    with pytest.raises(DataError, match=r"prompt.txt: has no \{passage\}; write it"):
        QuestionPrompt.of_file(tmp_path / "prompt.txt")
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert QuestionPrompt.of_file(tmp_path / "prompt.txt") == QuestionPrompt()
    (tmp_path / "prompt.txt").write_bytes(b"{passage} \xe9")
    with pytest.raises(DataError, match="cannot be read"):
        QuestionPrompt.of_file(tmp_path / "prompt.txt")


def test_refusals_duplicates_and_failures_are_counted_and_not_hidden(tmp_path):
    words = [f"word{letter * 3}" for letter in "abcdefghi"]
    said = {
        words[0]: "",
        words[1]: "No.",
        words[2]: "What does it do with files?",
        words[3]: Answer(failure="no room"),
        words[4]: "What is Common to Pages?",
        words[5]: "what is common  to pages ?",
        words[6]: Answer(failure="no room"),
    }
    report = run(
        tmp_path / "q.jsonl",
        Scripted(lambda text: said.get(first_word(text), about_the_first_word(text))),
    )
    reasons = {reason: count for reason, count in report.refused.items() if count}
    assert reasons == {"empty": 1, "no question": 1, "pronoun": 1}
    assert tuple(report.refused) == REASONS
    assert (report.failed, report.duplicates, report.kept) == (2, 1, 3)
    assert dict(report.failures) == {"no room": 2} and balanced(report)
    assert sum(report.kept_thirds) == 3
    queries = [example.query for example in iter_examples(tmp_path / "q.jsonl")]
    assert "What is Common to Pages?" in queries


def test_raw_answers_stand_in_the_log_with_their_passages(tmp_path):
    run(tmp_path / "q.jsonl", Scripted(lambda _: "  raw, no question "))
    head, *lines = map(json.loads, log_path(tmp_path / "q.jsonl").read_text().splitlines())
    assert head["generator"] == {"model": "scripted"} and head["seed"] == 0
    texts = {document.id: document.text for document in documents()}
    assert [line["answer"] for line in lines] == ["  raw, no question "] * 9
    assert {line["document"] for line in lines} == set(texts)
    assert all(0 < line["position"] < 1 for line in lines)


def test_without_a_question_no_file_is_written_and_an_old_one_stays(tmp_path):
    out = tmp_path / "q.jsonl"
    run(out, Scripted(about_the_first_word))
    before = out.read_bytes()
    other = tmp_path / "none.jsonl"
    assert run(other, Scripted(lambda _: "No.")).kept == 0 and not other.exists()
    assert out.read_bytes() == before


# ---- going on ----------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path):
    whole = run(tmp_path / "whole.jsonl", Scripted(about_the_first_word))
    stopped = Scripted(about_the_first_word, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "q.jsonl", stopped)
    assert not (tmp_path / "q.jsonl").exists() and len(stopped.asked) == 4
    rest = Scripted(about_the_first_word)
    report = run(tmp_path / "q.jsonl", rest)
    assert (report.answered_before, report.answered, report.kept) == (4, 5, whole.kept)
    assert (tmp_path / "q.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not {prompt.text for prompt in stopped.asked} & {prompt.text for prompt in rest.asked}


def test_after_kill_9_no_answer_is_asked_for_again(tmp_path):
    calls: list[str] = []

    def reply(text: str) -> str:
        calls.append(text)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return about_the_first_word(text)

    child = os.fork()
    if child == 0:
        try:
            run(tmp_path / "q.jsonl", Scripted(reply))
        finally:
            os._exit(1)  # never back into the tests
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    report = run(tmp_path / "q.jsonl", Scripted(about_the_first_word))
    assert (report.answered_before, report.answered, report.kept) == (5, 4, 9)


def test_failed_calls_are_made_again_and_answers_are_not(tmp_path):
    def sometimes(text: str) -> str | Answer:
        good = first_word(text) < "wordeee"
        return about_the_first_word(text) if good else Answer(failure="busy")

    first = run(tmp_path / "q.jsonl", Scripted(sometimes))
    assert (first.failed, first.kept) == (5, 4)
    again = Scripted(about_the_first_word)
    second = run(tmp_path / "q.jsonl", again)
    assert (len(again.asked), second.failed, second.kept) == (5, 0, 9) and balanced(second)


def test_more_documents_and_samples_cost_no_answer_twice(tmp_path):
    out = tmp_path / "q.jsonl"
    sizes = []
    for count, samples in ((3, 1), (7, 1), (7, 3), (7, 3)):
        generator = Scripted(lambda text: f"What is said of {hash(text) % 10**9} by the makers?")
        report = run(
            out,
            generator,
            sampling=PassageSampling(documents=count, samples=samples, least=60, most=200),
        )
        sizes.append((len(generator.asked), report.passages, report.documents))
    assert sizes == [(3, 3, 3), (4, 7, 7), (14, 21, 7), (0, 21, 7)]


def test_a_line_that_was_cut_off_is_asked_again(tmp_path):
    out = tmp_path / "q.jsonl"
    run(out, Scripted(about_the_first_word))
    content = log_path(out).read_bytes()
    log_path(out).write_bytes(content[:-25])
    again = Scripted(about_the_first_word)
    assert run(out, again).kept == 9 and len(again.asked) == 1
    assert sorted(log_path(out).read_bytes().splitlines()) == sorted(content.splitlines())
    log_path(out).write_bytes(content[:30])  # killed while the log was begun
    assert run(out, Scripted(about_the_first_word)).answered == 9


def test_a_document_that_has_changed_is_asked_about_again(tmp_path):
    out = tmp_path / "q.jsonl"
    run(out, Scripted(about_the_first_word))
    changed = documents()
    changed[2] = Document("d2", changed[2].text.replace("wordccc", "wordxyz"))
    again = Scripted(about_the_first_word)
    assert run(out, again, docs=changed).kept == 9 and len(again.asked) == 1
    assert any("wordxyz" in example.query for example in iter_examples(out))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"about": {"model": "other"}}, r"another generator \({'model': 'scripted'}, now"),
        ({"prompt": QuestionPrompt(language="Korean")}, "another prompt digest"),
        ({"sampling": PassageSampling(least=60, most=200, seed=3)}, r"another seed \(0, now 3\)"),
        (
            {"sampling": PassageSampling(least=70, most=200)},
            r"another shortest passage \(60, now 70\)",
        ),
        ({"sampling": PassageSampling(least=60, most=210)}, "another longest passage"),
    ],
)
def test_other_settings_for_the_same_output_are_refused(tmp_path, how, said):
    out = tmp_path / "q.jsonl"
    run(out, Scripted(about_the_first_word))
    before = log_path(out).read_bytes()
    generator = Scripted(about_the_first_word, **{k: how.pop(k) for k in ("about",) if k in how})
    with pytest.raises(RecipeError, match=f"q.log.jsonl: its answers were made with {said}"):
        run(out, generator, **how)
    assert generator.asked == [] and log_path(out).read_bytes() == before


@pytest.mark.parametrize("content", ['{"query": "x"}\n', "no json", "[]\n", '{"query": "x"}'])
def test_a_file_of_another_kind_in_the_place_of_the_log_is_left_alone(tmp_path, content):
    log = log_path(tmp_path / "q.jsonl")
    log.write_text(content)
    with pytest.raises(DataError, match=r"q.log.jsonl: is not a file of a generator's answers"):
        run(tmp_path / "q.jsonl", Scripted(about_the_first_word))
    assert log.read_text() == content


def test_a_damaged_line_of_the_log_is_named(tmp_path):
    run(tmp_path / "q.jsonl", Scripted(about_the_first_word))
    log = log_path(tmp_path / "q.jsonl")
    lines = log.read_text().splitlines()
    for damaged in ("{", '{"document": "d0"}', "[1]"):
        log.write_text("\n".join([*lines[:3], damaged, *lines[4:]]) + "\n")
        with pytest.raises(DataError, match=r"q.log.jsonl:4: is not an answer; delete the line"):
            run(tmp_path / "q.jsonl", Scripted(about_the_first_word))


def test_two_processes_do_not_write_one_log(tmp_path):
    about = {"a": 1}
    with (
        answer_log(tmp_path / "q.log.jsonl", about),
        pytest.raises(RecipeError, match="another process is writing there"),
        answer_log(tmp_path / "q.log.jsonl", about),
    ):
        pass
    with answer_log(tmp_path / "q.log.jsonl", about) as log:
        assert len(log) == 0


def test_a_full_disk_is_reported_and_answers_before_it_are_kept(tmp_path):
    out = tmp_path / "q.jsonl"
    with small_disk(900), pytest.raises(StorageError, match=r"q.log.jsonl: could not be written"):
        run(out, Scripted(about_the_first_word))
    report = run(out, Scripted(about_the_first_word))
    assert report.answered_before > 0 and report.answered > 0 and report.kept == 9


def test_a_generator_that_only_fails_is_stopped(tmp_path):
    many = [Document(f"d{n}", text) for n, text in enumerate(d.text for d in documents(26))]
    generator = Scripted(lambda _: Answer(failure="status 503: 'down'"))
    said = f"scripted: {FAILING} calls in a row failed, the last one with: status 503: 'down'"
    with pytest.raises(ModelError, match=said):
        run(tmp_path / "q.jsonl", generator, docs=many)
    assert len(generator.asked) == FAILING
    turns = iter(range(26))
    now_and_then = Scripted(
        lambda text: about_the_first_word(text) if next(turns) % 13 == 12 else Answer(failure="x")
    )
    assert run(tmp_path / "q.jsonl", now_and_then, docs=many).failed == 24


def test_documents_without_a_passage_are_counted_and_none_at_all_is_refused(tmp_path):
    table = Document("table", "12 | 99 | 3.14 \n" * 60)
    report = run(tmp_path / "q.jsonl", Scripted(about_the_first_word), docs=[*documents(3), table])
    assert (report.documents, report.unusable, report.passages) == (4, 1, 3)
    with pytest.raises(RecipeError, match="no document has a passage of 60 to 200 characters"):
        run(tmp_path / "none.jsonl", Scripted(about_the_first_word), docs=[table])
    assert not log_path(tmp_path / "none.jsonl").exists()


# ---- consistency -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedder(encoder_folder):
    return Embedder.load(encoder_folder)


def slow_ranks(embedder: Embedder, asked: list[list[str]], texts: list[list[str]]):
    """Ranks by loops over vectors that were made one at a time, in float64."""
    vectors = {text: embedder.encode([text])[0].astype(np.float64) for d in texts for text in d}
    for own, questions in enumerate(asked):
        queries = [embedder.encode([q], "query")[0].astype(np.float64) for q in questions]
        best = [[max(float(q @ vectors[text]) for text in d) for d in texts] for q in queries]
        yield [1 + sum(score > row[own] + 1e-9 for score in row) for row in best]


@pytest.mark.parametrize("shard", [4, 4096])
def test_a_rank_is_that_of_the_document_by_its_nearest_passage_in_its_shard(
    embedder, tmp_path, monkeypatch, shard
):
    monkeypatch.setattr("tercet.curate.synthesis.consistency.SHARD", shard)
    texts = [[SENTENCES[i], *([SENTENCES[i - 1]] if i % 3 == 0 else [])] for i in range(1, 11)]
    asked = [[f"who can {t[0][:20]}?"] * (i % 3) for i, t in enumerate(texts)]
    check = Consistency(embedder=embedder, work=tmp_path)
    found = list(
        ranks(
            (Candidate(str(i), t, q) for i, (t, q) in enumerate(zip(texts, asked, strict=True))),
            check,
        )
    )
    assert [name for name, _ in found] == [str(i) for i in range(10)]
    expected = [
        places
        for begin in range(0, 10, shard)
        for places in slow_ranks(
            embedder, asked[begin : begin + shard], texts[begin : begin + shard]
        )
    ]
    assert [places for _, places in found] == expected
    assert len({place for _, places in found for place in places}) > 1


@pytest.mark.parametrize("against", ["passages", "documents"])
def test_a_question_that_does_not_find_its_document_is_dropped(embedder, tmp_path, against):
    def reply(text: str) -> str:
        return f"Which page tells of {first_word(text)} and its many parts?"

    everything = run(tmp_path / "all.jsonl", Scripted(reply))
    kept = []
    for top in (1, 4, 8):
        check = Consistency(
            embedder=embedder, top=top, among=9, against=against, work=tmp_path / "v"
        )
        again = Scripted(reply)
        report = run(tmp_path / "all.jsonl", again, check=check)
        assert again.asked == [] and balanced(report) and report.checked_among == 9
        kept.append(report.kept)
        assert report.inconsistent == everything.kept - report.kept
    assert kept == sorted(kept) and kept[0] < kept[-1]


def test_documents_that_are_not_asked_about_are_in_the_way(embedder, tmp_path):
    check = Consistency(embedder=embedder, top=1, among=8, work=tmp_path / "v")
    few = PassageSampling(documents=2, least=60, most=200)
    generator = Scripted(about_the_first_word)
    report = run(tmp_path / "q.jsonl", generator, sampling=few, check=check)
    assert len(generator.asked) == report.passages == 2
    assert (report.documents, report.checked_among) == (2, 8)


def test_a_check_among_few_documents_is_remarked(embedder, tmp_path, caplog):
    check = Consistency(embedder=embedder, top=2, work=tmp_path / "v")
    run(tmp_path / "q.jsonl", Scripted(about_the_first_word), check=check)
    assert "questions were checked among only 9 documents, of which the best 2 pass" in caplog.text


@pytest.mark.parametrize("how", [{"top": 0}, {"top": 5, "among": 5}])
def test_checks_that_test_nothing_are_refused(embedder, how):
    with pytest.raises(RecipeError, match="top must be at least 1 and below among"):
        Consistency(embedder=embedder, **how)
