import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tercet.data.batches.collate import Collator
from tercet.data.batches.sampler import BatchRows
from tercet.data.files.texts import open_texts
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.objectives.distil import Distil
from tests.losses.test_matching import slow_relational
from tests.toy import SENTENCES

PROMPTS = {"query": "play ", "document": "read "}
CHOSEN = (0, 3, 5, 8, 10)


@pytest.fixture
def source(tmp_path, cache):
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES) + "\n")
    return open_texts(tmp_path / "texts.txt")


@pytest.fixture
def teacher(encoder_folder, tmp_path):
    """The whole encoder, Matryoshka-trained at 16 coordinates."""
    Embedder.load(encoder_folder, prompts=PROMPTS, dims=(16,)).save(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def at_work(folder, source, objective, **settings):
    """A student of one layer, in float64 and without dropout."""
    student = Embedder.load(folder, keep_layers=1, prompts=PROMPTS, **settings).double().eval()

    def prompt_of(role, task):
        return student.settings.prompt(role)

    collate = Collator(tokenize=student.tokenize, prompt_of=prompt_of)
    work = objective.start(student, [source], collate)
    return student, work


def batch_of(work, *chosen):
    return work.batch(BatchRows(np.zeros(len(chosen), np.int16), np.array(chosen)), [0])


def test_texts_are_read_after_the_student_s_prompts_in_the_roles_of_their_rows(
    encoder_folder, source, teacher
):
    student, work = at_work(encoder_folder, source, Distil(teacher=teacher, read_as="both"))
    batch = batch_of(work, *CHOSEN)
    assert batch.rows.row.tolist() == [3, 5, 0, 8, 10]  # those of odd rows are queries
    for place, row in enumerate(batch.rows.row.tolist()):
        role = "query" if row % 2 else "document"
        (expected,) = student.tokenize([SENTENCES[row]], role).ids
        start, end = batch.texts.offsets[place : place + 2].tolist()
        assert batch.texts.ids[start:end].tolist() == expected.tolist()


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("dims", [(), (8, 32)])
def test_the_loss_is_the_mean_over_all_widths_of_both_parts(
    encoder_folder, source, teacher, weight, dims
):
    objective = Distil(teacher=teacher, relational=weight, temperature=0.1, dims=dims)
    student, work = at_work(encoder_folder, source, objective)
    work.prepare()
    batch = batch_of(work, *CHOSEN)
    losses = work.backward(batch, Chunks(1_000))
    texts = [SENTENCES[row] for row in CHOSEN]
    wanted = Embedder.load(teacher).encode(texts)
    wanted = torch.from_numpy(wanted.astype(np.float16)).double()
    found = student(batch.texts)
    distance, neighbours = [], []
    for width in {16, *dims, 64}:
        own, its = found[:, :width], wanted[:, :width]
        distance.append(1 - F.cosine_similarity(own, its).mean())
        neighbours.append(slow_relational(own, its, 0.1))
    expected = torch.stack(distance).mean() + weight * 0.1 * torch.stack(neighbours).mean()
    torch.testing.assert_close(losses["loss"], expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses["distance"], torch.stack(distance).mean().detach())
    assert ("neighbours" in losses) == bool(weight)
    learned = [(p, p.grad.clone()) for p in student.parameters() if p.grad is not None]
    weights, got = ([pair[i] for pair in learned] for i in range(2))
    torch.testing.assert_close(
        got, list(torch.autograd.grad(expected, weights)), rtol=1e-4, atol=1e-6
    )


def test_chunks_change_no_gradient(encoder_folder, source, teacher):
    found = []
    for chunks in (Chunks(1_000), Chunks(25, graph_tokens=0)):
        student, work = at_work(encoder_folder, source, Distil(teacher=teacher))
        work.prepare()
        work.backward(batch_of(work, *CHOSEN), chunks)
        found.append([p.grad for p in student.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def test_the_teacher_cuts_texts_where_the_student_does(encoder_folder, source, teacher):
    _, work = at_work(encoder_folder, source, Distil(teacher=teacher), document_tokens=6)
    work.prepare()
    batch = batch_of(work, 0)
    assert work._stored is not None
    short = Embedder.load(teacher, document_tokens=6).encode([SENTENCES[0]])
    np.testing.assert_allclose(work._stored.of(batch.rows).numpy(), short, atol=1e-3)
    assert batch.truncated == 1


def test_a_student_takes_over_widths_and_ranges_and_says_whose_space_it_shares(
    encoder_folder, source, teacher
):
    from tercet.rank.quantized import Ranges

    folder = teacher
    embedder = Embedder.load(folder)
    found = Ranges.learned(embedder.encode(SENTENCES))
    embedder.settings = replace(embedder.settings, ranges={64: found})
    embedder.save(folder)
    objective = Distil(teacher=folder, dims=(32,))
    student, work = at_work(encoder_folder, source, objective)
    before = student.settings
    work.settle()
    settings = student.settings
    assert settings.dims == (16, 32) and list(settings.ranges) == [64]
    one, half = (Embedder.load(folder, dtype=each) for each in (torch.float32, torch.bfloat16))
    assert settings.shares_space_with == (one.fingerprint(), half.fingerprint())
    assert one.fingerprint() != half.fingerprint() and work.reads == {"teacher": one.fingerprint()}
    assert settings.prompts == before.prompts


def test_planning_encodes_nothing(encoder_folder, source, teacher, tmp_path):
    _, work = at_work(encoder_folder, source, Distil(teacher=teacher))
    batch_of(work, 0, 1)
    work.finish()
    assert not (tmp_path / "cache" / "teacher").exists()


def test_a_student_without_prompts_of_a_teacher_with_some_gets_a_warning(
    encoder_folder, source, teacher, caplog
):
    student, work = at_work(encoder_folder, source, Distil(teacher=teacher))
    student.settings = replace(student.settings, prompts={})
    with caplog.at_level(logging.WARNING):
        work.prepare()
    assert "set query_prompt and document_prompt" in caplog.text


def test_a_student_of_another_width_is_refused(encoder_folder, source, teacher):
    student = Embedder.load(encoder_folder)
    student.add_dense_layer(48)
    collate = Collator(tokenize=student.tokenize, prompt_of=lambda role, task: "")
    with pytest.raises(RecipeError, match="as wide as the teacher's; got 48 and 64 coordinates"):
        Distil(teacher=teacher).start(student, [source], collate)


def test_a_student_that_is_its_teacher_is_refused(encoder_folder, source):
    student = Embedder.load(encoder_folder)
    collate = Collator(tokenize=student.tokenize, prompt_of=lambda role, task: "")
    with pytest.raises(RecipeError, match=r"same model, .*; give fewer layers"):
        Distil(teacher=str(encoder_folder)).start(student, [source], collate)


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; give a number above 0"),
        ({"relational": -1.0}, "relational is -1.0; give a weight of 0 or more"),
        ({"dims": (8, 8)}, "dims are"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers, problem):
    with pytest.raises(RecipeError, match=problem):
        Distil(teacher="minilm", **numbers)
