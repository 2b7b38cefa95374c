"""The language-model head of a decoder, which turns its states into logits."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tercet.errors import ModelError
from tercet.losses.tokens import Head
from tercet.models.network.loading import loading
from tercet.models.zoo import zoo


@torch.no_grad()
def load_head(source: str | Path) -> Head:
    """Return the head of the model at a zoo name, a folder or a hub id, in float32, frozen.

    It is a copy, even if the head shares its weight with the token table. Loads the whole model
    for a moment, to compare its logits with those of the head on its states.

    Raises:
        ModelError: if the model has no such head, or one that changes logits in an unknown way.
    """
    with loading(f"{source}: has no language-model head"):
        model = load_with_head(
            AutoModelForCausalLM,
            source,
            "language-model",
            "masked next-token prediction needs them: start from the model that still has its head",
        )
    config = model.config.get_text_config()
    linear: Any = model.get_output_embeddings()
    head = Head(
        linear.weight.detach().clone(),
        None if getattr(linear, "bias", None) is None else linear.bias.detach().clone(),
        scale=_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )
    _verify(model, head, str(source))
    return head


def load_with_head(auto: Any, source: str | Path, kind: str, remedy: str) -> Any:
    """Return the model that a transformers class loads, with its head, in float32.

    Raises:
        ModelError: if weights of the head are missing; it ends with ``remedy``.
    """
    place = str(zoo.resolve(str(source)))
    model, report = auto.from_pretrained(place, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        lost = sorted(report["missing_keys"])[0]
        raise ModelError(f"{source}: the weights of its {kind} head are missing ({lost}); {remedy}")
    return model


def _scale(config: Any) -> float:
    """Cohere multiplies logits, Granite divides them."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )


def _verify(model: nn.Module, head: Head, source: str) -> None:
    """Raise unless the model's logits are those of the head on the model's last states."""
    ids = torch.arange(8)[None] % len(head.weight)
    base: Any = model.base_model
    states = base(input_ids=ids).last_hidden_state[0]
    wanted = model.eval()(input_ids=ids).logits[0].float()
    if states.shape[1] != head.weight.shape[1]:
        gap = float("inf")
    else:
        gap = float((head.logits(states.float()) - wanted).norm() / wanted.norm())
    if gap > 1e-4:
        raise ModelError(
            f"{source}: its logits are not its head times its states (they differ by {gap:.0%}), "
            "so masked next-token prediction cannot train it"
        )
