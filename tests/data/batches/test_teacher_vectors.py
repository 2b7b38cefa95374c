import numpy as np
import pytest
import torch

from tercet.data.batches import teacher_vectors as module
from tercet.data.batches.sampler import BatchRows
from tercet.data.batches.teacher_vectors import role_of_row, teacher_vectors
from tercet.data.files.texts import open_texts
from tercet.models.embedder import Embedder
from tests.toy import SENTENCES

PROMPTS = {"query": "the query ", "document": ""}


@pytest.fixture
def texts(tmp_path, cache, monkeypatch):
    """Two sources, the first in folders of 5, 5 and 2 texts."""
    monkeypatch.setattr(module, "SHARD", 5)
    for name, some in (("first", SENTENCES), ("second", SENTENCES[:3])):
        (tmp_path / f"{name}.txt").write_text("".join(f"{text} {name}\n" for text in some))
    return [open_texts(tmp_path / f"{name}.txt") for name in ("first", "second")]


@pytest.fixture
def teacher(encoder_folder):
    return Embedder.load(encoder_folder, prompts=PROMPTS)


@pytest.fixture
def encoded(teacher, monkeypatch):
    """The texts that the teacher has encoded."""
    seen, encode = [], teacher.encode

    def counted(some, *args, **options):
        seen.extend(some)
        return encode(some, *args, **options)

    monkeypatch.setattr(teacher, "encode", counted)
    return seen


def rows(*places):
    return BatchRows(np.array([s for s, _ in places], np.int16), np.array([r for _, r in places]))


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("read_as", ["document", "query", "both"])
def test_rows_are_the_teacher_s_vectors_of_their_texts_in_their_roles(texts, teacher, read_as):
    stored = teacher_vectors(teacher, texts, read_as)
    places = [(0, 11), (1, 2), (0, 3), (0, 4), (0, 5), (1, 0), (0, 3)]
    found = stored.of(rows(*places))
    assert found.dtype == torch.float32
    for vector, (source, row) in zip(found.numpy(), places, strict=True):
        (example,) = texts[source].examples([row])
        role = role_of_row(row, read_as)
        (expected,) = unit(teacher.encode([example.query], role))
        np.testing.assert_allclose(vector, expected, atol=1e-3)  # kept in float16


def test_of_both_every_second_text_is_a_query(texts):
    assert [role_of_row(row, "both") for row in range(3)] == ["document", "query", "document"]


def test_they_are_encoded_once_and_those_of_a_killed_run_are_kept(
    texts, teacher, encoded, monkeypatch
):
    encode = teacher.encode

    def dying(some, *args, **options):
        if len(encoded) >= 10:
            raise KeyboardInterrupt
        return encode(some, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(teacher, "encode", dying)
        teacher_vectors(teacher, texts, "document")
    assert len(encoded) == 10
    stored = teacher_vectors(teacher, texts, "document")
    assert len(encoded) == 12 + 3
    again = teacher_vectors(teacher, texts, "document")
    assert len(encoded) == 12 + 3
    chosen = rows((0, 1), (1, 1))
    assert torch.equal(stored.of(chosen), again.of(chosen))


def test_another_teacher_and_other_texts_are_encoded_again(texts, teacher, encoded, tmp_path):
    teacher_vectors(teacher, texts, "document")
    (tmp_path / "second.txt").write_text("another text\n")
    teacher_vectors(teacher, [texts[0], open_texts(tmp_path / "second.txt")], "document")
    assert encoded[15:] == ["another text"]
    before = teacher_vectors(teacher, texts[:1], "document").of(rows((0, 0)))
    with torch.no_grad():
        for weight in teacher.backbone.parameters():
            weight += 0.01
    after = teacher_vectors(teacher, texts[:1], "document").of(rows((0, 0)))
    assert len(encoded) == 16 + 12 and not torch.equal(before, after)


def test_another_field_of_the_same_file_is_encoded_again(tmp_path, teacher, encoded, cache):
    path = tmp_path / "fields.jsonl"
    path.write_text('{"text": "a body", "title": "a head"}\n')
    found = [
        teacher_vectors(teacher, [open_texts(path, field=field)], "document").of(rows((0, 0)))
        for field in ("text", "title", "text")
    ]
    assert encoded == ["a body", "a head"]
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


def test_texts_that_are_read_in_another_role_are_encoded_again(texts, teacher, encoded):
    found = [
        teacher_vectors(teacher, texts[:1], each).of(rows((0, 0))) for each in ("document", "query")
    ]
    assert len(encoded) == 24 and not torch.equal(*found)


def test_a_damaged_file_is_encoded_again(texts, teacher, encoded):
    stored = teacher_vectors(teacher, texts[:1], "document")
    expected = stored.of(rows((0, 7)))
    path = stored.shards[0][1]
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)
    again = teacher_vectors(teacher, texts[:1], "document")
    assert len(encoded) == 12 + 5
    assert torch.equal(again.of(rows((0, 7))), expected)


def test_vectors_are_kept_in_float16_with_unit_length(texts, encoder_folder):
    long = Embedder.load(encoder_folder, normalize=False)
    stored = teacher_vectors(long, texts[:1], "document")
    assert np.load(stored.shards[0][0]).dtype == np.float16
    lengths = stored.of(rows((0, 0), (0, 9))).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(2), atol=1e-3, rtol=0)
