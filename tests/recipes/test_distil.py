"""The recipe distil, from texts to a search in the teacher's index.

Run as a script, this file is one of two processes.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tercet import distributed
from tercet.data.batches import teacher_vectors as stored
from tercet.data.files.documents import Document
from tercet.data.files.sources import Source
from tercet.data.files.texts import open_texts
from tercet.errors import IndexFolderError, RecipeError
from tercet.models.embedder import Embedder
from tercet.models.quantize import quantized
from tercet.objectives import contrastive
from tercet.rank.quantized import Ranges
from tercet.recipes.distil import distil
from tercet.recipes.finetune import finetune
from tercet.search.text_index import IndexOptions, index, open_index
from tercet.training import checkpoint, trainer
from tercet.training.log import read
from tercet.training.loop import forecast, train
from tercet.training.recipe import Recipe, Run
from tercet.types import Example, ReadAs
from tests import toy
from tests.processes import run_together
from tests.toy import SENTENCES

QUIET = Run(device="cpu", show_progress=False, save_steps=2)
EVERY = [f"{text} {i}" for i in range(3) for text in SENTENCES]
DOCUMENTS = [Document(str(i), text) for i, text in enumerate(SENTENCES)]
QUESTIONS = ("a server for the web", "music", "a map of mountains", "type with fingers")


@pytest.fixture
def folder(tmp_path, cache) -> Path:
    return prepared(tmp_path)


def prepared(folder: Path, texts: Sequence[str] = EVERY) -> Path:
    """A teacher that was trained for 16 coordinates as well, without dropout, and texts."""
    config = toy.save_model(folder / "stock", "bert") / "config.json"
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | off))
    Embedder.load(folder / "stock", dims=(16,)).save(folder / "teacher")
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    return folder


def recipe(folder: Path, **changes: Any) -> Recipe:
    usual: dict[str, Any] = {"keep_layers": 2, "steps": 6, "batch_size": 8, "learning_rate": 1e-3}
    usual |= {"model": str(folder / "teacher"), "teacher": str(folder / "teacher")}
    return distil(**{**usual, **changes})


def trained(folder: Path, out: str, run: Run = QUIET, **changes: Any) -> Embedder:
    data = {"texts": [open_texts(folder / "texts.txt")]}
    return train(recipe(folder, **changes), data, folder / out, run=run)


def losses(folder: Path, out: str) -> list[float]:
    return [row["loss"] for row in read(folder / out / "log.jsonl") if "loss" in row]


def weights(embedder: Embedder) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in checkpoint.trainable(embedder).items()}


class Killed(BaseException):
    """The process dies in the middle of a step."""


def kill_after(steps: int, folder: Path, out: str, **changes: Any) -> None:
    backward, done = contrastive.backward_in_chunks, []

    def dying(*args: Any, **options: Any) -> Any:
        if len(done) == steps:
            raise Killed
        done.append(1)
        return backward(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(contrastive, "backward_in_chunks", dying)
        trained(folder, out, **changes)


def test_a_student_of_its_own_teacher_has_three_layers_and_another_one_all(folder):
    assert distil().model.keep_layers == 3
    assert distil(model="minilm").model.keep_layers is None
    assert distil(keep_layers=2).model.keep_layers == 2


# ---- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "places"), [("even", (0, 2)), ("first", (0, 1))])
def test_a_student_starts_from_layers_at_equal_distances_or_from_the_first(folder, which, places):
    teacher = Embedder.load(folder / "teacher").backbone.model.encoder.layer
    slow = {"which_layers": which, "learning_rate": 1e-12, "steps": 1}
    student = trained(folder, which, **slow)
    layers = student.backbone.model.encoder.layer
    assert len(teacher) == 3 and len(layers) == 2
    for layer, place in zip(layers, places, strict=True):
        found, expected = layer.state_dict(), teacher[place].state_dict()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    toy.align(folder / which / "model/model.safetensors")
    saved = Embedder.load(folder / which / "model")
    assert np.array_equal(saved.encode(SENTENCES), student.encode(SENTENCES))


def test_a_student_of_fewer_layers_comes_nearer_to_its_teacher(folder):
    before = Embedder.load(folder / "teacher", keep_layers=2)
    student = trained(folder, "run", steps=20)
    teacher = Embedder.load(folder / "teacher")
    after = Embedder.load(folder / "run/model")
    assert after.backbone.config.num_hidden_layers == 2
    found = [
        (each.encode(SENTENCES) * teacher.encode(SENTENCES)).sum(1) for each in (before, after)
    ]
    assert found[1].mean() > found[0].mean() + 0.05
    assert losses(folder, "run")[-1] < losses(folder, "run")[0] / 2
    assert after.settings.dims == (16,) and len(after.settings.shares_space_with) == 2
    np.testing.assert_allclose(after.encode(SENTENCES), student.encode(SENTENCES), atol=1e-5)


def test_a_run_that_was_killed_ends_with_the_same_bits_and_encodes_nothing_again(
    folder, monkeypatch
):
    whole = weights(trained(folder, "whole"))
    kill_after(3, folder, "killed")

    def encoded(*args: Any) -> Any:
        raise AssertionError("the teacher's vectors are stored")

    monkeypatch.setattr(stored, "_encoded", encoded)
    after = weights(trained(folder, "killed"))
    assert all(torch.equal(after[name], whole[name]) for name in whole)
    assert losses(folder, "killed") == losses(folder, "whole")


def test_a_finished_run_whose_model_is_gone_writes_it_again_and_encodes_nothing(
    folder, monkeypatch
):
    trained(folder, "run")
    about = Embedder.load(folder / "run/model").settings
    (folder / "run/model/tercet.json").unlink()
    shutil.rmtree(folder / "cache/teacher")

    def encoded(*args: Any) -> Any:
        raise AssertionError("no step is left")

    monkeypatch.setattr(stored, "_encoded", encoded)
    trained(folder, "run")
    assert Embedder.load(folder / "run/model").settings == about


def test_a_run_does_not_go_on_with_another_teacher_of_the_same_name(folder):
    kill_after(3, folder, "run")
    teacher = Embedder.load(folder / "teacher")
    with torch.no_grad():
        teacher.backbone.model.encoder.layer[2].output.dense.weight += 0.01
    teacher.save(folder / "teacher")
    with pytest.raises(RecipeError, match=r"holds a run with other settings .*teacher was '"):
        trained(folder, "run")


def test_a_run_does_not_go_on_with_another_field_of_the_same_file(folder):
    path = folder / "fields.jsonl"
    lines = (json.dumps({"text": text, "title": text[:9]}) for text in EVERY)
    path.write_text("\n".join(lines) + "\n")
    data = {field: {"texts": [open_texts(path, field=field)]} for field in ("text", "title")}
    train(recipe(folder), data["text"], folder / "run", run=QUIET)
    with pytest.raises(RecipeError, match=r"holds a run with other settings .*data fields was '"):
        train(recipe(folder), data["title"], folder / "run", run=QUIET)


@pytest.mark.parametrize("shown", [True, False])
def test_the_teacher_s_work_shows_a_bar_if_the_run_shows_progress(folder, monkeypatch, shown):
    bars, seen = trainer.bar, dict[str, bool]()

    def noted(label: str, *args: Any, shown: bool, **options: Any) -> Any:
        seen[label] = shown
        return bars(label, *args, shown=False, **options)

    monkeypatch.setattr(trainer, "bar", noted)
    trained(folder, "run", replace(QUIET, show_progress=shown), steps=1)
    assert seen == {"teacher's vectors of texts": shown, "distillation": shown}


def test_a_plan_encodes_nothing(folder, tmp_path):
    data = {"texts": [open_texts(folder / "texts.txt")]}
    (stage,) = forecast(recipe(folder), data, run=QUIET)
    assert stage.steps == 6 and stage.batch == "8 texts"
    assert not (tmp_path / "cache/teacher").exists()


def test_texts_are_cut_for_the_plan_as_for_the_training(folder):
    data = {"texts": [open_texts(folder / "texts.txt")]}
    (stage,) = forecast(recipe(folder, max_tokens=4), data, run=QUIET)
    assert stage.tokens == 8 * 4


def test_a_later_training_forgets_the_space(folder):
    trained(folder, "run")
    from tercet.data.files.sources import open_source, write_examples

    write_examples(folder / "pairs.jsonl", [Example(t.split()[-1], (t,)) for t in SENTENCES])
    said: list[str] = []
    model = train(
        finetune(str(folder / "run/model"), steps=1, batch_size=4),
        [open_source(folder / "pairs.jsonl")],
        folder / "later",
        run=QUIET,
        say=said.append,
    )
    assert model.settings.shares_space_with == model.settings.distilled_as == ()
    assert "training moves the base's vectors out of the space of its teacher" in "\n".join(said)


def test_a_later_stage_of_the_same_run_forgets_the_space_and_the_ranges(folder):
    from tercet.data.files.sources import open_source, write_examples

    teacher = Embedder.load(folder / "teacher")
    found = Ranges.learned(teacher.encode(SENTENCES))
    teacher.settings = replace(teacher.settings, ranges={64: found})
    teacher.save(folder / "teacher")
    write_examples(folder / "pairs.jsonl", [Example(t.split()[-1], (t,)) for t in SENTENCES])
    first, later = recipe(folder), finetune("any", steps=1, batch_size=4)
    data = {
        "texts": [open_texts(folder / "texts.txt")],
        "pairs": [open_source(folder / "pairs.jsonl")],
    }
    both = replace(first, stages=(*first.stages, *later.stages))
    train(both, data, folder / "run", run=QUIET)
    (one,) = (folder / "run").glob("1-*/model")
    distilled, last = Embedder.load(one).settings, Embedder.load(folder / "run/model").settings
    assert distilled.distilled_as == Embedder.load(one).fingerprints() and 64 in distilled.ranges
    assert (last.shares_space_with, last.distilled_as, last.ranges) == ((), (), {})


def test_untrained_weights_are_never_taken_for_a_student_s(folder):
    """They are in no space of the teacher's, however well they rank in their own."""
    falls = iter(range(100, 0, -1))
    data = {"texts": [open_texts(folder / "texts.txt")]}
    run = replace(QUIET, eval_steps=3, models_at=(0, 3))
    train(recipe(folder), data, folder / "run", run=run, score=lambda _: next(falls) / 100)
    (untrained, third), chosen = (
        [Embedder.load(folder / f"run/steps/{step}") for step in (0, 3)],
        Embedder.load(folder / "run/model"),
    )
    assert np.array_equal(chosen.encode(SENTENCES), third.encode(SENTENCES))
    assert not np.allclose(chosen.encode(SENTENCES), untrained.encode(SENTENCES), atol=1e-4)
    assert (untrained.settings.shares_space_with, untrained.settings.distilled_as) == ((), ())
    assert third.settings.shares_space_with == chosen.settings.shares_space_with != ()


def test_layers_are_chosen_only_where_some_are_left_out():
    with pytest.raises(RecipeError, match="which_layers is first, and all layers are kept; set"):
        distil(model="minilm", teacher="me5-small", which_layers="first")


@pytest.mark.parametrize("rank", [None, 4])
def test_a_saved_student_and_its_snapshots_know_their_own_fingerprints(folder, rank):
    trained(folder, "run", replace(QUIET, models_at=(3,)), lora_rank=rank)
    for place in (folder / "run/model", folder / "run/steps/3"):
        types = (torch.float32, torch.bfloat16)
        expected = tuple(Embedder.load(place, dtype=dtype).fingerprint() for dtype in types)
        assert Embedder.load(place).settings.distilled_as == expected


def test_a_narrower_student_gets_a_layer_that_is_saved_and_resumed(folder):
    """Its vectors are as wide as the teacher's, and lie in its space."""
    wide = Embedder.load(folder / "teacher")
    wide.add_dense_layer(96)
    wide.save(folder / "wide")
    teacher = str(folder / "wide")
    kill_after(3, folder, "killed", teacher=teacher)
    whole, after = (trained(folder, out, teacher=teacher) for out in ("whole", "killed"))
    assert whole.dim == 96 and "dense_layers.0.linear.weight" in checkpoint.trainable(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(after)[name])
    student = Embedder.load(folder / "whole/model")
    assert student.settings.shares_space_with[0] == Embedder.load(teacher).fingerprint()
    np.testing.assert_allclose(student.encode(SENTENCES), whole.encode(SENTENCES), atol=1e-5)
    index(DOCUMENTS, teacher, folder / "index")
    with open_index(folder / "index", model=str(folder / "whole/model")) as light:
        assert len(light.search(QUESTIONS, 2)[0]) == 2


# ---- two processes -----------------------------------------------------------------------------


def run_of_two(folder: Path) -> None:
    """Train with a fresh cache of 5 texts a folder, and note which of them are encoded."""
    os.environ["TERCET_CACHE"] = str(folder / "cache-of-two")
    encode, starts = stored._encoded, list[int]()

    def noted(teacher: Embedder, source: Source, start: int, read_as: ReadAs) -> np.ndarray:
        starts.append(start)
        return encode(teacher, source, start, read_as)

    stored.__dict__.update(SHARD=5, _encoded=noted)
    distributed.start()
    model = trained(folder, "two", steps=3)
    torch.save((starts, weights(model)), folder / f"rank-{distributed.rank()}.pt")
    distributed.stop()


@pytest.mark.slow
def test_two_processes_end_like_one_and_share_the_teacher_s_work(folder):
    run_together(__file__, str(folder))
    one = weights(trained(folder, "one", steps=3))
    (starts, first), (others, second) = (torch.load(folder / f"rank-{r}.pt") for r in range(2))
    assert starts == list(range(0, len(EVERY), 10)) and others == list(range(5, len(EVERY), 10))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(folder, "two") == pytest.approx(losses(folder, "one"), abs=1e-5)
    # The softmax over keys is free of their bias, whose gradient is rounding noise.
    learned = [name for name in one if not name.endswith("key.bias")]
    both = ([found[name] for name in learned] for found in (first, one))
    torch.testing.assert_close(*both, rtol=0, atol=1e-4)


# ---- search with the student in the teacher's index --------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERCET_CACHE", str(folder / "cache"))
        prepared(folder, SENTENCES)
        trained(folder, "run", steps=120, batch_size=12, learning_rate=3e-3)
        index(DOCUMENTS, str(folder / "teacher"), folder / "index")
        yield folder


def test_the_student_finds_most_of_what_the_teacher_finds_in_its_index(searched):
    place, student = searched / "index", str(searched / "run/model")
    with open_index(place) as usual, open_index(place, model=student) as light:
        expected = [hits[0].record.id for hits in usual.search(SENTENCES, 1)]
        found = [hits[0].record.id for hits in light.search(SENTENCES, 1)]
    untrained = Embedder.load(searched / "teacher", keep_layers=2).encode(SENTENCES, "query")
    scores = untrained @ Embedder.load(searched / "teacher").encode(SENTENCES).T
    same = [str(best) for best in scores.argmax(1)]
    assert expected == [str(i) for i in range(12)]
    agree, before = (sum(map(str.__eq__, each, expected)) for each in (found, same))
    assert agree >= 11 and agree > before


def test_an_index_of_fewer_coordinates_and_bfloat16_weights_is_searched_too(searched):
    options = IndexOptions(dims=16, precision="bfloat16")
    index(DOCUMENTS, str(searched / "teacher"), searched / "short", options)
    with open_index(searched / "short", model=str(searched / "run/model")) as light:
        assert light.search(QUESTIONS, 1)[0][0].record.text in SENTENCES


def test_a_model_that_was_not_distilled_from_the_index_s_is_refused(searched):
    other = toy.save_model(searched / "other", "xlm-roberta")
    for model in (other, searched / "stock"):
        with pytest.raises(RecipeError) as caught:
            open_index(searched / "index", model=str(model))
        assert str(caught.value) == (
            f"{model} cannot search {searched / 'index'}: it must be the index's model, "
            f"{searched / 'teacher'}, or one that was distilled from it (tercet train distil), and "
            "both unchanged since"
        )


@pytest.mark.parametrize(
    "change",
    [{"keep_layers": 1}, {"pooling": "first"}, {"query_tokens": 4}],
    ids=["layers", "pooling", "length"],
)
def test_a_student_that_was_changed_since_is_refused(searched, change):
    Embedder.load(searched / "run/model", **change).save(searched / "changed")
    with pytest.raises(RecipeError, match=r"cannot search .*distilled .* unchanged since"):
        open_index(searched / "index", model=str(searched / "changed"))


def test_a_student_with_8_bit_weights_searches_the_teacher_s_index(searched):
    made = quantized(Embedder.load(searched / "run/model"), EVERY).embedder
    made.save(searched / "light-int8")
    with open_index(searched / "index", model=str(searched / "light-int8")) as light:
        assert light.search(SENTENCES[:1], 1)[0][0].record.text in SENTENCES


def test_an_index_of_other_kinds_is_refused_also_if_the_student_makes_them(searched):
    rich = Embedder.load(searched / "teacher", kinds=("dense", "sparse"))
    rich.save(searched / "rich")
    theirs = Embedder.load(searched / "rich").fingerprints()
    student = Embedder.load(searched / "run/model", kinds=("dense", "sparse"))
    student.settings = replace(
        student.settings, shares_space_with=theirs, distilled_as=student.fingerprints()
    )
    student.save(searched / "light")
    index(DOCUMENTS, str(searched / "rich"), searched / "both")
    with pytest.raises(RecipeError, match="the index has sparse vectors; build one of dense"):
        open_index(searched / "both", model=str(searched / "light"))
    index(DOCUMENTS, str(searched / "rich"), searched / "dense", IndexOptions(kinds=["dense"]))
    with open_index(searched / "dense", model=str(searched / "light")) as light:
        assert light.search(QUESTIONS, 1)[0][0].record.text in SENTENCES


def test_an_index_made_for_a_task_needs_a_student_with_its_prompts(searched):
    prompts = {"facts": {"query": "is it so: "}}
    Embedder.load(searched / "teacher", task_prompts=prompts).save(searched / "asked")
    theirs = Embedder.load(searched / "asked").fingerprints()
    index(DOCUMENTS, str(searched / "asked"), searched / "facts", IndexOptions(task="facts"))
    for name, known in (("without", {}), ("with", prompts)):
        student = Embedder.load(searched / "run/model", task_prompts=known)
        student.settings = replace(
            student.settings, shares_space_with=theirs, distilled_as=student.fingerprints()
        )
        student.save(searched / name)
    with pytest.raises(RecipeError, match="for the task facts, and the model has no prompt for it"):
        open_index(searched / "facts", model=str(searched / "without"))
    with open_index(searched / "facts", model=str(searched / "with")) as light:
        assert light.search(QUESTIONS, 1)[0][0].record.text in SENTENCES


def test_without_a_model_of_questions_the_index_asks_for_its_own(searched):
    def load(model: str, dtype: str) -> Embedder:
        return Embedder.load(searched / "run/model")

    with pytest.raises(IndexFolderError, match="was built with fingerprint"):
        open_index(searched / "index", load=load)


if __name__ == "__main__":
    run_of_two(Path(sys.argv[1]))
