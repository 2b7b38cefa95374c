import json

import numpy as np
import pytest

from tercet.errors import RecipeError
from tercet.evaluate.measures.prompts import (
    drop_prompts,
    encode_alike,
    known_task,
    require_prompt,
    task_names,
    warn_unprompted,
)
from tercet.models.embedder import Embedder, Settings
from tercet.models.settings import as_prompt
from tests.toy import SENTENCES

ASK, TELL = as_prompt("find the package"), as_prompt("tell its section")
TASKS = {"sections": {"query": TELL}, "plain": {"query": ""}, "files": {"document": "file: "}}


def records(path, *tasks):
    lines = [{"query": "a", "positives": ["b"], "task": task} for task in tasks]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_file_of_examples_goes_by_the_task_that_all_records_name_and_by_its_own_name(tmp_path):
    one = records(tmp_path / "dev.jsonl", "sections", "sections")
    assert task_names(one, examples=True) == ("sections", "dev")
    assert task_names(one) == ("dev",)
    several = records(tmp_path / "dev.jsonl", "sections", "plain")
    assert task_names(several, examples=True) == ("dev",)
    none = records(tmp_path / "dev.jsonl", None, None)
    assert task_names(none, examples=True) == ("dev", "dev")
    assert task_names(tmp_path / "beir") == ("beir",)


def test_a_task_is_the_first_name_that_the_model_has_prompts_for():
    settings = Settings(task_prompts=TASKS)
    assert known_task(settings, ("dev", "plain", "sections")) == "plain"
    assert known_task(settings, ("dev",)) is None
    assert known_task(Settings(), ("sections",)) is None


def test_texts_that_are_alike_get_the_prompt_of_the_task_or_the_default_one(encoder_folder, caplog):
    embedder = Embedder.load(encoder_folder, prompts={"query": ASK}, task_prompts=TASKS)
    texts = SENTENCES[:3]
    default, section = (embedder.encode(texts, "query", task=t) for t in (None, "sections"))
    assert np.abs(default - section).max() > 0.01
    np.testing.assert_array_equal(encode_alike(embedder, texts), default)
    np.testing.assert_array_equal(encode_alike(embedder, texts, task="sections"), section)
    np.testing.assert_array_equal(encode_alike(embedder, texts, task="files"), default)
    documents = embedder.encode(texts, "document", task="files")
    np.testing.assert_array_equal(
        encode_alike(embedder, texts, "document", task="files"), documents
    )
    assert not caplog.messages
    encode_alike(embedder, texts, "document")
    assert caplog.text.count("a document gets no prompt") == 1
    with pytest.raises(RecipeError, match="no prompt for the task 'lost'; it knows: files, plain"):
        encode_alike(embedder, texts, task="lost")


@pytest.mark.parametrize(
    ("settings", "role", "task", "warned"),
    [
        (Settings(), "query", None, False),
        (Settings(prompts={"query": ASK}), "query", None, False),
        (Settings(prompts={"query": ASK}), "document", None, False),
        (Settings(prompts={"document": "file: "}), "query", None, False),
        (Settings(task_prompts=TASKS), "query", "sections", False),
        (Settings(task_prompts=TASKS), "query", "plain", False),  # learned without one
        (Settings(task_prompts=TASKS), "query", None, True),
        (Settings(prompts={"query": ASK}, task_prompts=TASKS), "query", None, False),
        (Settings(task_prompts=TASKS), "document", None, True),
    ],
)
def test_a_role_without_a_prompt_is_told_or_refused_where_the_model_learned_one_for_it(
    settings, role, task, warned, caplog
):
    warn_unprompted(settings, role, task)
    assert len(caplog.messages) == warned
    if not warned:
        require_prompt(settings, role, task, what="dev")
        return
    with pytest.raises(RecipeError, match=f"^dev: a {role} gets no prompt, .*--no-prompts.*file:"):
        require_prompt(settings, role, task, what="dev")


def test_the_warning_names_the_prompts_that_the_model_knows(caplog):
    many = {f"t{n}": {"query": f"tell {n}:\n"} for n in range(7)}
    warn_unprompted(Settings(task_prompts={**TASKS, **many}), "query", None)
    (said,) = caplog.messages
    assert said.startswith("a query gets no prompt, but the model was trained with some")
    assert "sections-query 'Instruct: tell its section Query:', files-document 'file:', t0" in said
    assert said.endswith("t2-query 'tell 2:' and 4 more")


def test_prompts_are_dropped_with_a_word_about_them_and_then_not_used(encoder_folder, caplog):
    embedder = Embedder.load(encoder_folder, prompts={"query": ASK}, task_prompts=TASKS)
    bare = Embedder.load(encoder_folder).encode(SENTENCES, "query")
    drop_prompts(embedder)
    (said,) = caplog.messages
    assert said.startswith("measured without prompts, as requested, but the model was trained with")
    assert "query 'Instruct: find the package Query:', sections-query 'Instruct: tell" in said
    np.testing.assert_array_equal(encode_alike(embedder, SENTENCES), bare)
    drop_prompts(Embedder.load(encoder_folder))
    assert len(caplog.messages) == 1
