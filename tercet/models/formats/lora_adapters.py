"""Low-rank adapters in peft's folder format, merged into the weights they were trained on.

peft only warns if an adapter's weights do not match the model; here that is an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tercet.errors import ModelError
from tercet.files.console import shortened
from tercet.models.network.backbone import Backbone
from tercet.models.network.loading import Shapes, loading, misfits, read_object, shapes_of


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter; transformers then takes no other weights from it."""
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path) -> str:
    """Return the model that an adapter changes: a folder or a hub id.

    Raises:
        ModelError: if the adapter does not name it, or names its own folder.
    """
    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{folder}: does not name the model that it changes; set base_model_name_or_path in "
            "adapter_config.json, or merge it with a base: tercet merge --model"
        )
    if Path(base).resolve() == folder.resolve():
        raise ModelError(
            f"{folder}: holds an adapter that names its own folder as its base; move "
            "adapter_config.json and the adapter's weights into another folder, and merge them: "
            "tercet merge"
        )
    return base


def merge_adapter(backbone: Backbone, folder: Path) -> None:
    """Add the adapter in ``folder`` to the weights, in float32.

    Its keys may be those of a bare decoder, as llm2vec writes them, or of one with a head. An
    error leaves the backbone half changed: load it again.

    Raises:
        ModelError: if files are missing or damaged, or the adapter does not fit the model.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    backbone.require_float("no adapter can be merged into it")
    config, weights = _read_adapter(folder)
    backbone.merge_lora()  # an earlier adapter, not merged yet
    prefix = f"base_model.model.{backbone.model.base_model_prefix}."
    try:
        model = get_peft_model(backbone.model, config)
    except ValueError as error:
        raise ModelError(
            f"{folder}: the adapter does not fit its base, which has none of the modules that it "
            "changes; give the base that it was trained on"
        ) from error
    places = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {_without_head(key, prefix, places): value for key, value in weights.items()}
    if problems := misfits(_named_shapes(weights), _named_shapes(places)):
        raise ModelError(
            f"{folder}: the adapter does not fit its base, which is {backbone.hidden} wide: "
            f"{problems}; give the base that it was trained on"
        )
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
        raise ModelError(f"{folder}: is an adapter of type {kind}; tercet merges LoRA only")
    config.megatron_config = None  # peft would import the module that the file names
    ranks = (config.r, *(config.rank_pattern or {}).values())
    largest = max((max(weight.shape, default=0) for weight in weights.values()), default=0)
    if not all(type(rank) is int and 1 <= rank <= max(largest, 1) for rank in ranks):
        raise ModelError(
            f"{folder}: adapter_config.json gives the rank {shortened(str(config.r))}, which none "
            "of its weights has; copy or download the adapter again"
        )
    config.task_type = None  # a task would wrap the model in a class that expects a head
    config.base_model_name_or_path = None  # peft would warn that the base lies elsewhere
    return config, weights


def _without_head(key: str, prefix: str, places: Mapping[str, Tensor]) -> str:
    bare = f"base_model.model.{key.removeprefix(prefix)}"
    return bare if key.startswith(prefix) and bare in places else key


def _named_shapes(weights: Mapping[str, Tensor]) -> Shapes:
    return {
        name.removeprefix("base_model.model."): shape for name, shape in shapes_of(weights).items()
    }
