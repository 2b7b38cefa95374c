"""AdamW over the weights in training, and a state of it that any number of processes reads."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.sharding import is_sharded, kept_by_main, part_of
from tercet.train import checkpoint
from tercet.train.recipe import Stage


def adamw(embedder: Embedder, stage: Stage) -> torch.optim.Optimizer:
    """AdamW over a stage's weights; biases and norms are not decayed.

    Raises:
        RecipeError: when there is nothing to train.
    """
    weights = list(checkpoint.trainable(embedder).values())
    if not weights:
        raise RecipeError("every weight is frozen; train with LoRA or leave some weights free")
    groups = [
        {"params": [p for p in group if is_sharded(p) == sharded], "weight_decay": decay}
        for group, decay in zip(_groups(weights), (stage.weight_decay, 0.0), strict=True)
        for sharded in (False, True)  # a fused step takes no mixture of both
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=stage.learning_rate, fused=True)


def state_of(optimizer: torch.optim.Optimizer, embedder: Embedder) -> dict[str, Any]:
    """Its state as if nothing were sharded, in the first process; all have to ask for it."""
    plain = optimizer.state_dict()
    weights = list(checkpoint.trainable(embedder).values())
    order = _places(optimizer)
    groups = [group for group in _groups(weights) if group]
    if not any(map(is_sharded, weights)):
        return plain
    state, described = {}, []
    for group in groups:
        settings = next(
            told
            for told, own in zip(plain["param_groups"], optimizer.param_groups, strict=True)
            if any(p is group[0] for p in own["params"])
        )
        first = len(state)
        for number, weight in enumerate(group, start=first):
            held = plain["state"].get(order[id(weight)], {})
            state[number] = {name: kept_by_main(value) for name, value in held.items()}
        described.append({**settings, "params": list(range(first, len(state)))})
    return {"state": {k: v for k, v in state.items() if v}, "param_groups": described}


def restore(optimizer: torch.optim.Optimizer, embedder: Embedder, saved: Mapping[str, Any]) -> None:
    """Take up a state of :func:`state_of`; of sharded weights, this process's parts of it."""
    weights = list(checkpoint.trainable(embedder).values())
    if not any(map(is_sharded, weights)):
        optimizer.load_state_dict(dict(saved))
        return
    canonical = [weight for group in _groups(weights) for weight in group]
    order, own = _places(optimizer), optimizer.state_dict()
    own["state"] = {
        order[id(weight)]: {
            name: part_of(value, weight) if value.shape == weight.shape else value
            for name, value in saved["state"][number].items()
        }
        for number, weight in enumerate(canonical)
        if number in saved["state"]
    }
    optimizer.load_state_dict(own)


def _groups(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The weights that are decayed, and those that are not."""
    return [[p for p in weights if p.ndim > 1], [p for p in weights if p.ndim <= 1]]


def _places(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Of each weight, by its identity, the number that a state dict has for it."""
    held = [weight for group in optimizer.param_groups for weight in group["params"]]
    return {id(weight): number for number, weight in enumerate(held)}
