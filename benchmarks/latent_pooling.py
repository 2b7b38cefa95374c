"""What latent attention pooling costs: the reference's form, keys and values once, and folded.

A layer of 512 latents and 8 heads behind a backbone 1,024 wide, in float32; each head as wide as
the model, as the reference has it at its published size, and 4,096 wide, its literal default. Eight
random texts of one length, so nothing is padded (padding factor 1): what is measured is the form.

- The peer repeats the latents over the batch and projects each copy to keys and values.
- "once" projects them once a call, as in training; "folded" is what ``encode`` takes.
- Errors are the largest difference of a state, over the largest state of the peer.
- Memory is what a call needs above weights, states, and what is kept between calls; that is given
  on its own, as ``kept GB``.

Run: python -m benchmarks.latent_pooling [REPEATS]
"""

import sys
from collections.abc import Callable
from ctypes import CDLL
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, extra_memory, interleaved, write_results
from tercet.models.choices import LayerSettings
from tercet.models.network.latent_attention import AttentionLayer, Folded, build_layer
from tercet.segments import Packed, offsets_of

HIDDEN, LATENTS, HEADS, TEXTS = 1_024, 512, 8, 8
HEAD_SIZES = (1_024, 4_096)
LENGTHS = (20, 128, 512)

Form = Callable[[AttentionLayer, Tensor, Packed], Tensor]


@torch.inference_mode()
def reference(layer: AttentionLayer, states: Tensor, texts: Packed) -> Tensor:
    """The latents stand in the batch once for each text, and are projected as often."""
    padded = states.view(len(texts), -1, HIDDEN)
    latents = layer.latents.repeat(len(texts), 1, 1)
    keys, values = layer.to_kv(layer.norm_context(latents)).chunk(2, dim=-1)
    queries = layer.to_q(layer.norm_query(padded))
    q, k, v = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (queries, keys, values))
    found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    padded = padded + layer.to_out(found)
    value, gate = layer.ff_in(layer.norm_ff(padded)).chunk(2, dim=-1)
    return (padded + layer.ff_out(value * F.gelu(gate))).flatten(0, 1)


@torch.no_grad()
def once(layer: AttentionLayer, states: Tensor, texts: Packed) -> Tensor:
    """Keys and values of the latents are projected once a call, for all texts."""
    layer.train()
    return layer(states, texts)


@torch.inference_mode()
def folded(layer: AttentionLayer, states: Tensor, texts: Packed) -> Tensor:
    """As ``encode`` calls it."""
    return layer.eval()(states, texts)


FORMS: dict[str, Form] = {"reference": reference, "once": once, "folded": folded}


def inputs(head_size: int, length: int) -> tuple[AttentionLayer, Tensor, Packed]:
    """A layer with random weights, states, and the texts that they are of."""
    torch.manual_seed(0)
    layer = build_layer(LayerSettings(latents=LATENTS, heads=HEADS, head_size=head_size), HIDDEN)
    tokens = TEXTS * length
    ids, offsets = torch.zeros(tokens, dtype=torch.long), offsets_of(torch.full((TEXTS,), length))
    return layer, torch.randn(tokens, HIDDEN), Packed(ids, offsets, torch.ones_like(ids).bool())


def prepared(name: str, head_size: int, length: int) -> Callable[[], Tensor]:
    """A call whose inputs, and what is kept between calls, are already there."""
    layer, states, texts = inputs(head_size, length)
    if name == "folded":  # a single token, so that no memory of a batch can be used again
        one = torch.zeros(1, dtype=torch.long)
        folded(layer, states[:1], Packed(one, offsets_of(one + 1), one.bool()))
        CDLL(None).malloc_trim(0)  # nor what folding has freed
    return partial(FORMS[name], layer, states, texts)


def folding(head_size: int) -> Row:
    """What it takes to fold, once for each state of the weights."""
    layer, states, texts = inputs(head_size, 1)

    def not_kept() -> Tensor:
        layer.train()  # drops what was kept
        return folded(layer, states, texts)

    spent = interleaved({"not kept": not_kept, "kept": lambda: folded(layer, states, texts)}, 3)
    seconds = min(spent["not kept"]) - min(spent["kept"])
    return {
        "name": f"folding once, head size {head_size}",
        "ours": seconds,
        "peer": None,
        "unit": "CPU seconds",
        "ratio": None,
        "target": None,
        "error": None,
    }


def compared(head_size: int, length: int, repeats: int) -> list[Row]:
    """Both of our forms beside the reference's, in turns."""
    layers = {name: inputs(head_size, length) for name in FORMS}
    calls = {name: partial(form, *layers[name]) for name, form in FORMS.items()}
    spent = {name: min(seconds) for name, seconds in interleaved(calls, repeats).items()}
    results = {name: call() for name, call in calls.items()}
    memory = {name: extra_memory(partial(prepared, name, head_size, length)) for name in FORMS}
    peer = results["reference"]
    kept = layers["folded"][0]._kept._held
    assert kept is not None and isinstance(kept[2], Folded)
    held = {"folded": (kept[2].to_scores.nbytes + kept[2].to_states.nbytes) / 1e9, "once": 0.0}
    return [
        {
            "name": f"{name}, length {length}, head size {head_size}",
            "ours": spent[name],
            "peer": spent["reference"],
            "unit": "CPU seconds",
            "ratio": spent["reference"] / spent[name],
            "target": 10 if (name, length) == ("folded", 20) else None,
            "error": float((results[name] - peer).abs().max() / peer.abs().max()),
            "padding_factor": 1.0,
            "memory GB": [memory[name] / 1e9, memory["reference"] / 1e9],
            "kept GB": held[name],
        }
        for name in ("once", "folded")
    ]


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    rows: list[Row] = []
    for head_size in HEAD_SIZES:
        for length in LENGTHS:
            rows += compared(head_size, length, repeats)
        rows.append(folding(head_size))
    write_results("latent_pooling", rows)


if __name__ == "__main__":
    main()
