"""Copies of a network for inference, which any number of threads may run at the same time.

Running a network in evaluation mode, in another direction or on packed weights means changing its
modules. So each direction has a copy that is changed once, when it is made, and only read
afterwards. A copy shares the weights, so that it follows every change of them.
"""

from dataclasses import dataclass
from threading import Lock
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from tercet.models.choices import Attention
from tercet.models.network.backbone import Backbone, sharing_copy
from tercet.models.network.cpu.linear import Int8Linear, PackedLinear, packed_layers
from tercet.models.network.cpu.memory import rounded
from tercet.models.network.heads import Heads
from tercet.models.network.latent_attention import AttentionLayer
from tercet.segments import Packed


@dataclass(frozen=True, slots=True)
class Network:
    """What turns tokens into states and vectors."""

    backbone: Backbone
    layer: AttentionLayer | None
    heads: Heads
    packed: tuple[PackedLinear | Int8Linear, ...] = ()  # of a copy

    def states(self, texts: Packed) -> Float[Tensor, "tokens hidden"]:
        """Return one state per token, which the pooling and the heads read."""
        read = rounded(texts) if self.packed else texts
        states = self.backbone(read)
        if self.layer is not None:
            states = self.layer(states, read)
        return states[: len(texts.ids)]

    def parts(self) -> list[nn.Module]:
        """Return the modules that it consists of."""
        return [part for part in (self.backbone, self.layer, self.heads) if part is not None]


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy, and what the network consisted of when it was made."""

    network: Network
    objects: list[object]
    facts: list[object]


class Readers:
    """The copies of one network, by direction. Copies and pickles of this object begin empty."""

    def __init__(self) -> None:
        self._made: dict[Attention, _Copy] = {}
        self._lock = Lock()  # while a copy is made; running one needs no lock

    def of(self, network: Network, attention: Attention | None) -> Network:
        """Return the copy that reads in this direction; None takes the network's own.

        It is made again if a module, a parameter or a buffer was replaced, or has another type or
        device; numbers that changed in place are seen by packed layers.

        Raises:
            ModelError: see :meth:`Backbone.turned`.
        """
        direction = attention or network.backbone.attention
        objects, facts = _contents(network)
        found = self._made.get(direction)
        if found is None or not _same(found, objects, facts):
            with self._lock:
                found = self._made.get(direction)
                if found is None or not _same(found, objects, facts):
                    found = self._made[direction] = _copy_of(network, direction, objects, facts)
        for layer in found.network.packed:
            layer.refresh()
        return found.network

    def clear(self) -> None:
        """Free all copies; the next use makes them again."""
        with self._lock:
            self._made = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Readers, ()


def _copy_of(
    network: Network, direction: Attention, objects: list[object], facts: list[object]
) -> _Copy:
    backbone = network.backbone.turned(direction).eval()
    layer = None if network.layer is None else sharing_copy(network.layer).eval()
    linear: list[nn.Module] = [backbone]
    if layer is not None:  # of a folded layer only the feed-forward runs
        linear += [layer.ff_in, layer.ff_out] if layer.folds else [layer]
    packed = packed_layers(nn.ModuleList(linear))
    heads = sharing_copy(network.heads).eval()
    return _Copy(Network(backbone, layer, heads, tuple(packed)), objects, facts)


def _contents(network: Network) -> tuple[list[object], list[object]]:
    """Return the objects that a copy depends on, and facts about them that can change."""
    objects: list[object] = []
    facts: list[object] = []
    for part in network.parts():
        for module in part.modules():
            tensors: list[Any] = [*module._parameters.values(), *module._buffers.values()]
            objects += (module, *tensors)
            facts += ((each.dtype, each.device) for each in tensors if each is not None)
            facts += (len(module._forward_hooks), len(module._forward_pre_hooks))
    return objects, facts


def _same(made: _Copy, objects: list[object], facts: list[object]) -> bool:
    return (
        len(made.objects) == len(objects)
        and all(map(lambda old, new: old is new, made.objects, objects))
        and made.facts == facts
    )
