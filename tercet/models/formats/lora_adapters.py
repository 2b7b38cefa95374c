"""Low-rank adapters in peft's folder format, added to the weights they were trained on.

peft only warns when an adapter's weights find no place in the model; here that is an error.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tercet.errors import ModelError
from tercet.models.network.backbone import Backbone
from tercet.models.network.loading import loading

_SHOWN = 3  # keys of each kind in a message


def merge_adapter(backbone: Backbone, folder: Path) -> None:
    """Add the adapter in ``folder`` to the weights, in float32.

    Its keys may be those of a bare decoder, as llm2vec writes them, or of one with a head. After
    an error the backbone is half changed: load it again.

    Raises:
        ModelError: when files are missing or damaged, or the adapter does not fit the model.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    config, weights = _read_adapter(folder)
    backbone.merge_lora()  # an earlier adapter, not merged yet
    prefix = f"base_model.model.{backbone.model.base_model_prefix}."
    try:
        model = get_peft_model(backbone.model, config)
    except ValueError as error:
        raise ModelError(
            f"{folder}: the adapter does not fit its base: none of the modules that it changes is "
            "there; give the base that it was trained on"
        ) from error
    places = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {_without_head(key, prefix, places): value for key, value in weights.items()}
    _check_fit(folder, weights, places, backbone.hidden)
    set_peft_model_state_dict(model, weights)
    backbone.model = model
    backbone.merge_lora()


def _read_adapter(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    from peft import LoraConfig, PeftConfig
    from peft.utils import load_peft_weights

    files = ("adapter_model.safetensors", "adapter_model.bin")
    if not any((folder / name).is_file() for name in files):
        raise ModelError(f"{folder}: has no {files[0]}; is the download complete?")
    with loading(f"{folder}: the adapter cannot be read"):
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    if not isinstance(config, LoraConfig):
        kind = str(config.peft_type).rpartition(".")[2]
        raise ModelError(f"{folder}: is an adapter of the kind {kind}; tercet merges LoRA only")
    config.task_type = None  # a task would wrap the model in a class that expects a head
    config.base_model_name_or_path = None  # peft would warn that the base lies elsewhere
    return config, weights


def _without_head(key: str, prefix: str, places: Mapping[str, Tensor]) -> str:
    bare = f"base_model.model.{key.removeprefix(prefix)}"
    return bare if key.startswith(prefix) and bare in places else key


def _check_fit(
    folder: Path, weights: Mapping[str, Tensor], places: Mapping[str, Tensor], hidden: int
) -> None:
    problems = []
    missing = [key for key in places if key not in weights]
    unexpected = [key for key in weights if key not in places]
    if missing:
        problems.append(f"{len(missing)} weights are missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} have no place in the base ({_some(unexpected)})")
    other = [
        f"{key} is {_size(weight)}, here {_size(places[key])}"
        for key, weight in weights.items()
        if key in places and weight.shape != places[key].shape
    ]
    if other:
        problems.append(
            f"{len(other)} are of another size ({_some(other)}; the base is {hidden} wide)"
        )
    if problems:
        raise ModelError(
            f"{folder}: the adapter does not fit its base: {'; '.join(problems)}; "
            "give the base that it was trained on"
        )


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(key.removeprefix("base_model.model.") for key in keys[:_SHOWN])
    return f"{shown}, ..." if len(keys) > _SHOWN else shown


def _size(weight: Tensor) -> str:
    return " x ".join(map(str, weight.shape))
