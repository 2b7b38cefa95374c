import random
from collections import Counter
from itertools import pairwise

import pytest

from tercet.curate.synthesis.passages import PassageSampling, draw_documents, draw_passages, windows
from tercet.data.files.documents import Document
from tercet.errors import RecipeError

WORDS = "the editor opens large files slowly while maps of rivers load at once".split()


def prose(sentences: int, seed: int, end: str = ". ", breaks: int = 4) -> str:
    """Sentences of random words, in paragraphs of ``breaks``."""
    draw = random.Random(seed)
    parts = []
    for number in range(1, sentences + 1):
        parts.append(" ".join(draw.choices(WORDS, k=draw.randint(4, 14))).capitalize())
        parts.append(".\n\n" if number % breaks == 0 else end)
    return "".join(parts)


@pytest.mark.parametrize(
    "text",
    [
        prose(60, 0),
        prose(60, 1, breaks=30),
        prose(40, 2, breaks=99),
        "unbrokenletters" * 100,
        "長い文です。" * 200,
        "word " * 400,
        "  \n\n" * 50 + prose(9, 3) + " " * 500 + prose(9, 4),
    ],
)
def test_windows_have_the_lengths_asked_for_and_no_blanks_around_them(text):
    found = list(windows(text, 80, 200))
    assert found
    for start, end in found:
        assert 80 <= end - start <= 200
        assert text[start:end] == text[start:end].strip()


def test_windows_begin_at_paragraphs_and_in_long_ones_at_sentences():
    text = prose(60, 0)
    begins = {0} | {i + 2 for i in range(len(text)) if text.startswith("\n\n", i)}
    assert {start for start, _ in windows(text, 100, 2000)} <= begins
    long = prose(60, 1, breaks=60)
    found = list(windows(long, 100, 400))
    assert all(long[start].isupper() and long[end - 1] == "." for start, end in found)
    assert len(found) > 40


def test_a_short_paragraph_before_a_long_one_begins_a_window_too():
    parts = [prose(1, n)[:50].strip() + "." if n % 2 else prose(9, n)[:190] for n in range(1, 9)]
    text = "\n\n".join(part.replace("\n\n", " ") for part in parts)
    assert {text.index(part) for part in parts[0::2]} <= {
        start for start, _ in windows(text, 80, 200)
    }


def test_a_text_that_is_shorter_than_a_passage_has_none():
    assert list(windows("too short", 80, 200)) == []
    assert list(windows("", 80, 200)) == []


def documents(count: int) -> list[Document]:
    return [Document(f"d{n}", prose(20 + n % 7, n), title=f"page {n}") for n in range(count)]


def test_documents_are_drawn_by_seed_and_id_and_not_by_their_order():
    some = documents(40)
    few, many = (draw_documents(some, PassageSampling(), count) for count in (7, 30))
    assert list(many)[:7] == list(few) and list(few.values()) == list(range(7))
    assert draw_documents(reversed(some), PassageSampling(), 7) == few
    assert draw_documents(some, PassageSampling(seed=1), 7) != few
    everything = draw_documents(some, PassageSampling(), None)
    assert len(everything) == 40 and list(everything)[:30] == list(many)


def test_documents_shorter_than_a_passage_are_not_drawn():
    some = [*documents(3), Document("short", "A line."), Document("blank", " " * 900 + "a")]
    assert set(draw_documents(some, PassageSampling(), None)) == {"d0", "d1", "d2"}


def test_passages_are_parts_of_the_document_that_do_not_overlap():
    for rank, document in enumerate(documents(12)):
        found = draw_passages(document, PassageSampling(samples=4, least=100, most=300), rank)
        assert len(found) == 4
        for passage in found:
            assert passage.text == document.text[passage.start : passage.end]
            assert (passage.document, passage.title) == (document.id, document.title)
            middle = (passage.start + passage.end) / 2 / len(document.text)
            assert passage.position == pytest.approx(middle)
            assert passage.third == (0 if middle < 1 / 3 else 1 if middle < 2 / 3 else 2)
        spans = sorted((p.start, p.end) for p in found)
        assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_positions_are_balanced_over_documents_and_within_one():
    sampling = PassageSampling(least=100, most=300)
    ranked = list(enumerate(documents(30)))
    first = Counter(draw_passages(d, sampling, rank)[0].third for rank, d in ranked)
    assert first == {0: 10, 1: 10, 2: 10}
    three = PassageSampling(samples=3, least=100, most=300)
    assert all({p.third for p in draw_passages(d, three, rank)} == {0, 1, 2} for rank, d in ranked)


def test_more_samples_keep_the_passages_that_were_drawn():
    document = documents(5)[4]
    one, four = (
        draw_passages(document, PassageSampling(samples=n, least=100, most=300), 1) for n in (1, 4)
    )
    assert four[:1] == one
    other = draw_passages(document, PassageSampling(least=100, most=300, seed=5), 1)
    again = [draw_passages(document, PassageSampling(least=100, most=300), 1) for _ in range(2)]
    assert again[0] == again[1] == one != other


def test_where_a_third_has_no_prose_another_one_is_taken():
    text = prose(12, 0) + "\n\n" + "0x7f 12 99 | 3.14 -- " * 200
    for rank in range(3):
        (found,) = draw_passages(Document("d", text), PassageSampling(least=100, most=300), rank)
        assert found.end <= len(prose(12, 0)) + 2 and found.third == 0
    table = Document("t", "12 99 | 3.14 -- " * 100)
    assert draw_passages(table, PassageSampling(least=100, most=300), 0) == []


@pytest.mark.parametrize("text", ["แสดงรายการไฟล์ที่มีขนาดใหญ่ " * 20, "ファイルを一覧表示する。" * 30])
def test_letters_and_their_marks_are_prose_in_every_script(text):
    assert draw_passages(Document("d", text), PassageSampling(least=50, most=150), 0)


def test_a_changed_text_has_another_digest():
    before, after = (
        draw_passages(
            Document("d", "A" * n + prose(9, 0)), PassageSampling(least=50, most=2000), 0
        )[0]
        for n in (1, 2)
    )
    assert before.digest != after.digest


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"documents": 0}, "documents and samples must be at least 1; got 0 and 1"),
        ({"samples": 0}, "got 1000 and 0"),
        ({"least": 300, "most": 599}, "twice as long as the shortest; got 300 to 599"),
        ({"least": 0}, "got 0 to 1500"),
    ],
)
def test_impossible_samplings_are_refused(how, said):
    with pytest.raises(RecipeError, match=said):
        PassageSampling(**how)
