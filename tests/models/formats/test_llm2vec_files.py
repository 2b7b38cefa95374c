import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tercet.errors import ModelError
from tercet.models.formats.llm2vec_files import POOLINGS, SEPARATOR, adapter_folder, read_llm2vec

FIXTURE = Path(__file__).parents[2] / "fixtures" / "llm2vec"
LLAMA3 = "meta-llama/Meta-Llama-3-8B-Instruct"


def publish(folder: Path, *, base: str = "", **settings) -> list[Path]:
    """The fixture's two folders, with another name of the base and other settings."""
    folders = [folder / "mntp", folder / "simcse"]
    for place in folders:
        shutil.copytree(FIXTURE / place.name, place)
    config = json.loads((folders[0] / "config.json").read_text())
    (folders[0] / "config.json").write_text(json.dumps(config | {"_name_or_path": base}))
    (folders[1] / "llm2vec_config.json").write_text(json.dumps(settings))
    return folders


def test_what_the_last_folder_says_counts_and_the_rest_takes_the_packages_defaults(tmp_path):
    said = read_llm2vec([FIXTURE / "mntp", FIXTURE / "simcse"])
    assert (said.pooling, said.max_tokens, said.text_tokens) == ("weighted_mean", 96, 60)
    assert said.tokenizer == FIXTURE / "mntp"
    assert said.base == "base"
    usual = read_llm2vec([FIXTURE / "mntp"])
    assert (usual.pooling, usual.max_tokens, usual.text_tokens) == ("mean", 512, 400)
    assert not usual.pool_instruction
    pooled = read_llm2vec(publish(tmp_path, skip_instruction=False, max_length=77))
    assert pooled.pool_instruction
    assert (pooled.max_tokens, pooled.text_tokens) == (77, 400)
    # The first token stands before the text, so no border may hide it.
    first = read_llm2vec(publish(tmp_path / "first", pooling_mode="bos_token"))
    assert (first.pooling, first.pool_instruction) == ("first", True)


def test_a_text_stands_after_its_instruction_and_one_space():
    said = read_llm2vec([FIXTURE / "mntp"])
    assert said.joined(" Find it: ", " a ") == f"Find it: {SEPARATOR} a "
    assert said.joined("", " a ") == f"{SEPARATOR} a "


@pytest.mark.parametrize(
    ("base", "pooling", "expected"),
    [
        ("somebody/else", "mean", f"Find: {SEPARATOR} a "),
        ("somebody/else", "eos_token", f"Find: {SEPARATOR} a </s>"),
        ("meta-llama/Meta-Llama-3-8B", "eos_token", f"Find: {SEPARATOR} a<|end_of_text|>"),
        ("meta-llama/Llama-2-7b-chat-hf", "mean", f"[INST] Find: {SEPARATOR} a [/INST]"),
        (
            LLAMA3,
            "eos_token",
            f"<|start_header_id|>user<|end_header_id|>\n\nFind: {SEPARATOR} a<|eot_id|>",
        ),
    ],
)
def test_the_template_hangs_on_the_name_of_the_base(tmp_path, base, pooling, expected):
    said = read_llm2vec(publish(tmp_path, base=base, pooling_mode=pooling))
    assert said.joined("Find:", " a ") == expected


def test_the_name_in_the_adapter_counts_where_the_config_has_none(tmp_path):
    folders = publish(tmp_path)
    adapter = json.loads((folders[0] / "adapter_config.json").read_text())
    changed = adapter | {"base_model_name_or_path": "Qwen/Qwen2-7B-Instruct"}
    (folders[0] / "adapter_config.json").write_text(json.dumps(changed))
    said = read_llm2vec(folders)
    assert (said.base, said.after) == ("Qwen/Qwen2-7B-Instruct", "<|im_end|>")


def test_every_pooling_of_the_package_is_known():
    recorded = np.load(FIXTURE / "vectors.npz")
    stage = {name.partition("/")[2] for name in recorded if name.startswith("mntp/")}
    assert stage == set(POOLINGS)


def test_damaged_files_are_named(tmp_path):
    folders = publish(tmp_path, pooling_mode="max")
    path = folders[1] / "llm2vec_config.json"
    with pytest.raises(ModelError) as error:
        read_llm2vec(folders)
    assert str(error.value) == (
        f'{path}: pools by "max"; llm2vec knows mean, weighted_mean, eos_token, last_token, '
        "bos_token"
    )
    path.write_text('{"max_length": "long"}')
    with pytest.raises(ModelError, match='"max_length" should be 512 or the like'):
        read_llm2vec(folders)
    path.write_text("[]")
    with pytest.raises(ModelError, match="should hold one JSON object"):
        read_llm2vec(folders)
    path.write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_llm2vec(folders)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        adapter_folder(tmp_path / "nothing")
    with pytest.raises(ModelError) as error:
        adapter_folder(FIXTURE / "base")
    assert str(error.value) == (
        f"{FIXTURE / 'base'}: has no adapter_config.json, so it is not an adapter; "
        "a whole model is given as the base"
    )
    with pytest.raises(ModelError, match="somebody/adapter: is no local folder, and could not be"):
        adapter_folder("somebody/adapter")  # tests are offline
    assert adapter_folder(FIXTURE / "mntp") == FIXTURE / "mntp"
