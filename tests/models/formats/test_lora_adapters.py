import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tercet.errors import ModelError
from tercet.models.formats.lora_adapters import merge_adapter
from tercet.models.network.backbone import Backbone
from tests import toy

MODULES = ["q_proj", "v_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"
FIXTURE = Path(__file__).parents[2] / "fixtures" / "llm2vec"


def stock() -> Any:
    return toy.random_model(toy.DECODERS["llama"])


def write_adapter(folder: Path, rank: int, alpha: int) -> Path:
    """A random adapter of the toy Llama."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=MODULES)
    model = get_peft_model(stock(), config)
    torch.manual_seed(rank)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def rewrite(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def states(backbone: Backbone) -> torch.Tensor:
    backbone.eval()
    torch.manual_seed(5)
    with torch.no_grad():
        return backbone(toy.pack(*toy.random_texts(7, 12)))


def changed_by_hand(*adapters: tuple[Path, float]) -> Backbone:
    """W + scale * B @ A for every module of every adapter, in turn."""
    model = stock()
    with torch.no_grad():
        for folder, scale in adapters:
            low = load_file(folder / WEIGHTS)
            for key, down in low.items():
                if ".lora_A." in key:
                    up = low[key.replace(".lora_A.", ".lora_B.")]
                    name = key.removeprefix("base_model.model.").replace(".lora_A", "")
                    model.get_parameter(name).add_(scale * up @ down)
    return Backbone(model, attention="bidirectional")


def test_two_merged_adapters_are_the_base_plus_both_updates(tmp_path):
    # Spec test 15. Scales are alpha / rank: 10 / 4 and 6 / 3.
    one, two = write_adapter(tmp_path / "1", 4, 10), write_adapter(tmp_path / "2", 3, 6)
    backbone = Backbone(stock(), attention="bidirectional")
    merge_adapter(backbone, one)
    merge_adapter(backbone, two)
    assert not backbone.has_lora
    assert backbone.attention == "bidirectional"
    found = states(backbone)
    torch.testing.assert_close(found, states(changed_by_hand((one, 2.5), (two, 2.0))))
    assert (found - states(changed_by_hand((two, 2.0)))).abs().max() > 0.01


def test_an_adapter_that_is_still_on_the_model_is_merged_first(tmp_path):
    one, two = write_adapter(tmp_path / "1", 4, 10), write_adapter(tmp_path / "2", 3, 6)
    trained = Backbone(stock())
    trained.model = get_peft_model(
        trained.model, LoraConfig(r=4, lora_alpha=10, target_modules=MODULES)
    )
    low = {
        key.replace(".weight", ".default.weight"): w for key, w in load_file(one / WEIGHTS).items()
    }
    trained.model.load_state_dict(low, strict=False)
    merge_adapter(trained, two)
    in_turn = Backbone(stock())
    merge_adapter(in_turn, one)
    merge_adapter(in_turn, two)
    for name, weight in in_turn.model.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], weight)


def test_weights_of_16_bits_are_rounded_once_after_the_update_is_added(tmp_path):
    one = write_adapter(tmp_path / "1", 4, 10)
    half, full = Backbone(stock().to(torch.bfloat16)), Backbone(stock().to(torch.bfloat16).float())
    merge_adapter(half, one)
    merge_adapter(full, one)
    for name, weight in full.model.state_dict().items():
        assert torch.equal(half.model.state_dict()[name], weight.to(torch.bfloat16))


def test_keys_of_a_model_with_a_head_fit_the_bare_decoder_too(tmp_path):
    one = write_adapter(tmp_path / "1", 4, 10)
    two = Path(shutil.copytree(one, tmp_path / "2"))
    start = "base_model.model."
    rewrite(two, lambda low: {f"{start}model.{k.removeprefix(start)}": w for k, w in low.items()})
    config = json.loads((two / "adapter_config.json").read_text())
    with_task = {**config, "task_type": "CAUSAL_LM"}
    (two / "adapter_config.json").write_text(json.dumps(with_task))
    bare, headed = Backbone(stock()), Backbone(stock())
    merge_adapter(bare, one)
    merge_adapter(headed, two)
    for name, weight in bare.model.state_dict().items():
        assert torch.equal(headed.model.state_dict()[name], weight)


def test_missing_and_unexpected_weights_are_listed(tmp_path):
    folder = write_adapter(tmp_path / "1", 4, 10)

    def change(low):
        low.pop("base_model.model.layers.1.self_attn.q_proj.lora_A.weight")
        low["base_model.model.lm_head.lora_A.weight"] = torch.zeros(4, 64)
        return low

    rewrite(folder, change)
    with pytest.raises(ModelError) as error:
        merge_adapter(Backbone(stock()), folder)
    assert str(error.value) == (
        f"{folder}: the adapter does not fit its base, which is 64 wide: 1 missing: "
        "layers.1.self_attn.q_proj.lora_A.weight; 1 unknown: lm_head.lora_A.weight; "
        "give the base that it was trained on"
    )


def test_an_adapter_of_a_base_of_another_width_is_refused_with_both_widths(tmp_path):
    with pytest.raises(ModelError) as error:
        merge_adapter(Backbone(stock()), FIXTURE / "mntp")
    message = str(error.value)
    assert "14 missing: layers.2." in message
    assert "lora_A.weight (4 x 32, expected 4 x 64)" in message
    assert "its base, which is 64 wide" in message


def test_an_adapter_of_another_architecture_is_refused():
    gpt2 = toy.random_model(toy.t.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100))
    with pytest.raises(ModelError, match=r"does not fit its base, which has none of the modules"):
        merge_adapter(Backbone(gpt2), FIXTURE / "mntp")


def test_other_kinds_of_adapters_are_refused(tmp_path):
    folder = tmp_path / "ia3"
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    get_peft_model(stock(), config).save_pretrained(str(folder), save_embedding_layers=False)
    with pytest.raises(ModelError, match="is an adapter of type IA3; tercet merges LoRA only"):
        merge_adapter(Backbone(stock()), folder)


def test_incomplete_folders_are_named(tmp_path):
    folder = write_adapter(tmp_path / "1", 4, 10)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NEW"}))
    with pytest.raises(ModelError, match="the adapter cannot be read"):
        merge_adapter(Backbone(stock()), folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / WEIGHTS).write_bytes(b"half a file")
    with pytest.raises(ModelError, match="the adapter cannot be read"):
        merge_adapter(Backbone(stock()), folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError) as error:
        merge_adapter(Backbone(stock()), folder)
    assert str(error.value) == f"{folder}: has no {WEIGHTS}; is the download complete?"
