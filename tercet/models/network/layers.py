"""The list of a network's layers: found, cut to some of them, compiled."""

import torch
from torch import nn
from transformers import AttentionInterface

from tercet.errors import ModelError
from tercet.models.network.attention import NAME, attend
from tercet.models.network.backbone import Backbone, probe


def layers_of(backbone: Backbone) -> list[nn.Module]:
    """Return its layers, first to last; an empty list if one runs several times, as in ALBERT."""
    return list(_held(backbone) or ())


def keep_even_layers(backbone: Backbone, count: int) -> None:
    """Keep ``count`` layers at equal distances, the first and the last among them, in place.

    Of 12 layers, 3 are the 1st, 7th and 12th; one alone is the first. The config is changed too, so
    a saved folder is an ordinary one.

    Raises:
        ModelError: if the model has fewer layers, shares one among several places, or differs in
            the shapes of its layers' weights.
    """
    model, config, held = backbone.model, backbone.config.get_text_config(), _held(backbone)
    name, most = type(model).__name__, config.num_hidden_layers
    backbone.require_float("its layers cannot be chosen")
    if not 1 <= count <= most:
        raise ModelError(f"{name}: keep_layers must be between 1 and {most}; got {count}")
    if held is None:
        raise ModelError(f"{name}: has no list of layers to choose from; set which_layers to first")
    chosen = [round(n * (most - 1) / max(count - 1, 1)) for n in range(count)]
    for place in reversed(range(most)):
        if place not in chosen:
            del held[place]
    for key, value in list(vars(config).items()):  # layer_types, no_rope_layers and others
        if isinstance(value, list) and len(value) == most:
            setattr(config, key, [value[place] for place in chosen])
    config.num_hidden_layers = count
    with torch.device("meta"):
        if _shapes(model) != _shapes(type(model)(model.config)):
            raise ModelError(
                f"{name}: its layers differ in their weights; set which_layers to first"
            )
    probe(backbone)


def compile_layers(backbone: Backbone) -> int:
    """Compile each layer with torch.compile, for rows of any number of tokens; return their number.

    Attention stays outside, since it depends on where texts begin. Dropout draws the numbers that
    it draws without compilation, so a chunk that is embedded twice has the same masks. Copies for
    inference are not compiled. Compilation takes about a minute when the first chunk runs.
    """
    import torch._inductor.config as inductor  # slow to import

    AttentionInterface.register(NAME, torch.compiler.disable(attend))
    inductor.fallback_random = True
    layers = layers_of(backbone)
    for layer in layers:
        layer.compile(dynamic=True)
    return len(layers)


def _held(backbone: Backbone) -> nn.ModuleList | None:
    count = backbone.config.get_text_config().num_hidden_layers
    lists = [m for m in backbone.model.modules() if isinstance(m, nn.ModuleList)]
    return next((found for found in lists if len(found) == count == len({*found})), None)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    weights = model.state_dict().items()
    return {key: each.shape for key, each in weights if "pooler" not in key}
