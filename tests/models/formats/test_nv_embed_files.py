import json

import pytest

from tercet.errors import ModelError
from tercet.models.formats.nv_embed_files import (
    check_names,
    is_nv_embed,
    read_nv_embed,
    weight_files,
)
from tests.published import CONFIG, TEXT_CONFIG, publish

POOLER = CONFIG["latent_attention_config"]


def test_a_folder_is_known_by_its_kind_of_model(tmp_path, decoder_folder):
    assert is_nv_embed(publish(tmp_path / "published"))
    assert not is_nv_embed(decoder_folder)
    assert not is_nv_embed(tmp_path)


def test_what_the_configuration_says_is_read(tmp_path):
    said = read_nv_embed(publish(tmp_path))
    assert (said.latents, said.heads, said.head_size) == (7, 3, 20)
    assert (said.normalize, said.masks_instruction) == (True, True)
    assert said.text_config["hidden_size"] == 32
    assert not {"model_type", "architectures"} & {*said.text_config}
    assert said.instructions == {
        "Programs": {"query": "find the program"},
        "Sections": {"query": "name the section", "document": "name the section"},
    }


def test_sizes_that_are_left_open_are_those_of_the_7b_model(tmp_path):
    text = {name: value for name, value in TEXT_CONFIG.items() if name != "hidden_size"}
    publish(tmp_path, text_config=text, latent_attention_config={"model_type": "latent_attention"})
    (tmp_path / "instructions.json").unlink()
    said = read_nv_embed(tmp_path)
    assert (said.latents, said.heads, said.head_size, said.normalize) == (512, 8, 4096, True)
    assert said.instructions == {}
    publish(tmp_path, text_config=text, latent_attention_config=None)
    assert read_nv_embed(tmp_path).heads == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "should hold a JSON object"),
        ({"text_config": {"model_type": "llama"}}, "is not that of a Mistral"),
        (
            {"latent_attention_config": {**POOLER, "latent_dim": 40}},
            "gives the width as 32, 40; hidden_dim",
        ),
        (
            {"latent_attention_config": {**POOLER, "num_cross_heads": "3"}},
            "\"num_cross_heads\" is '3'; it should be like 8",
        ),
        (
            {"latent_attention_config": {**POOLER, "num_latents_value": 0}},
            '"num_latents_value" is 0; it should be like 512',
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=f"config.json: .*{message}"):
        read_nv_embed(publish(tmp_path, **changes))


@pytest.mark.parametrize("content", ['{"A": 3}', '{"A": {"query": 3}}', "[]", "{"])
def test_instructions_of_another_form_are_refused(tmp_path, content):
    publish(tmp_path)
    (tmp_path / "instructions.json").write_text(content)
    with pytest.raises(ModelError, match=r"instructions.json: .*is the download complete"):
        read_nv_embed(tmp_path)


def test_a_missing_or_damaged_configuration_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"config.json: is missing"):
        read_nv_embed(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json: is not JSON"):
        is_nv_embed(tmp_path)


def test_the_files_of_the_index_are_all_there_or_the_missing_one_is_named(tmp_path):
    publish(tmp_path, shards=3)
    names = [f"model-0000{i}.safetensors" for i in (1, 2, 3)]
    assert [path.name for path in weight_files(tmp_path)] == names
    (tmp_path / names[1]).unlink()
    with pytest.raises(ModelError, match=f"lacks {names[1]}; is the download complete"):
        weight_files(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ModelError, match="lacks weights"):
        weight_files(tmp_path)
    index.unlink()
    with pytest.raises(ModelError, match=r"lacks model.safetensors"):
        weight_files(tmp_path)


def test_of_many_wrong_names_three_are_shown(tmp_path):
    check_names(tmp_path, ["a", "b"], ["b", "a"])
    with pytest.raises(ModelError, match=r"4 are missing \(a, b, c, \.\.\.\) and 1 are unknown"):
        check_names(tmp_path, ["x"], list("abcd"))
