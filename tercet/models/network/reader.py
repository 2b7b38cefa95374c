"""Copies of a network for inference, which any number of threads may run at the same time.

Running a network in evaluation mode, in another direction or on packed weights means changing its
modules. So each direction has a copy that is changed once, when it is made, and only read
afterwards. A copy shares the weights, so that it follows every change of them.
"""

from dataclasses import dataclass, replace
from itertools import chain
from operator import is_
from threading import Lock

from jaxtyping import Float
from torch import Tensor, nn

from tercet.models.choices import Attention
from tercet.models.network.backbone import Backbone, sharing_copy
from tercet.models.network.cpu.direct import DirectForward
from tercet.models.network.cpu.int8 import Int8Linear
from tercet.models.network.cpu.linear import FEW_ROWS, PackedLinear, packed_layers
from tercet.models.network.cpu.memory import rounded
from tercet.models.network.dense_layers import DenseLayers
from tercet.models.network.fingerprints import version_of
from tercet.models.network.heads import Heads
from tercet.models.network.latent_attention import AttentionLayer
from tercet.segments import Packed


@dataclass(frozen=True, slots=True)
class Network:
    """What turns tokens into states and vectors."""

    backbone: Backbone
    layer: AttentionLayer | None
    heads: Heads
    dense_layers: DenseLayers

    def states(self, texts: Packed) -> Float[Tensor, "tokens hidden"]:
        """Return one state per token, which the pooling and the heads read."""
        states = self.backbone(texts)
        return states if self.layer is None else self.layer(states, texts)

    def parts(self) -> list[nn.Module]:
        """Return the modules that it consists of."""
        parts = (self.backbone, self.layer, self.heads, self.dense_layers)
        return [part for part in parts if part is not None]


@dataclass(slots=True)
class Reader:
    """A network for inference, which is only read.

    It multiplies by copies of the weights in another layout, which are compared with the weights
    when they are first needed. A few tokens are read before that by the weights themselves.
    """

    network: Network
    layers: tuple[PackedLinear | Int8Linear, ...]  # of the network
    plain: Network | None  # the same without copies of weights; None if it has none
    few: int  # of as many tokens at most, ``plain`` reads a call
    compared: bool = False

    @property
    def backbone(self) -> Backbone:
        """The backbone, with the weights of now."""
        self.compare()
        return self.network.backbone

    def states(self, texts: Packed) -> Float[Tensor, "tokens hidden"]:
        """Return one state per token, which the pooling and the heads read."""
        count = len(texts.ids)
        if self.plain is not None and count <= self.few and not self.compared:
            return self.plain.states(texts)
        self.compare()
        return self.network.states(rounded(texts) if self.layers else texts)[:count]

    def compare(self) -> None:
        """Copy the weights that changed; afterwards none may change while this is used."""
        if not self.compared:
            for layer in self.layers:
                layer.refresh()
            self.compared = True


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy, and what the network consisted of when it was made."""

    reader: Reader
    contents: "_Contents"


class Readers:
    """The copies of one network, by direction. Copies and pickles of this object begin empty."""

    def __init__(self) -> None:
        self._made: dict[Attention, _Copy] = {}
        self._lock = Lock()  # while a copy is made; running one needs no lock
        self._frozen = False

    def of(self, network: Network, attention: Attention | None) -> Reader:
        """Return the copy that reads in this direction; None takes the network's own.

        It is made again if a module, a parameter or a buffer was replaced, or has another type or
        device; numbers that changed in place are seen whenever a reader is asked for. Of frozen
        weights only those changes are seen that torch counts (``Tensor._version``).

        Raises:
            ModelError: see :meth:`Backbone.turned`.
        """
        direction = attention or network.backbone.attention
        found = self._made.get(direction)
        if found is None or not found.contents.are_those_of(network):
            with self._lock:
                found = self._made.get(direction)
                if found is None or not found.contents.are_those_of(network):
                    found = _copy_of(network, direction, with_versions=self._frozen)
                    if self._frozen:
                        found.reader.compare()
                    self._made[direction] = found
        return found.reader if self._frozen else replace(found.reader, compared=False)

    def freeze(self) -> None:
        """Compare no copy with its weights from now on."""
        if not self._frozen:
            self._frozen = True
            self.clear()

    def clear(self) -> None:
        """Free all copies; the next use makes them again."""
        with self._lock:
            self._made = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Readers, ()


def _copy_of(network: Network, direction: Attention, *, with_versions: bool) -> _Copy:
    contents = _Contents(network, with_versions=with_versions)
    backbone = network.backbone.turned(direction).eval()
    layer = None if network.layer is None else sharing_copy(network.layer).eval()
    heads, dense_layers = sharing_copy(network.heads), sharing_copy(network.dense_layers)
    made = Network(backbone, layer, heads.eval(), dense_layers.eval())
    plain = replace(made, backbone=sharing_copy(backbone)) if layer is None else None
    linear: list[nn.Module] = [backbone]
    if layer is not None:  # of a folded layer only the feed-forward runs
        linear += [layer.ff_in, layer.ff_out] if layer.folds else [layer]
    layers = tuple(packed_layers(nn.ModuleList(linear)))
    if backbone.device.type == "cpu":
        for each in (made, plain) if plain else (made,):
            each.backbone.direct = DirectForward.of(each.backbone.model)
    in_8_bits = any(isinstance(each, Int8Linear) for each in layers)
    if not layers or in_8_bits:  # their products differ from those of the weights
        plain = None
    few = FEW_ROWS.get(next(backbone.parameters()).dtype, 0)
    return _Copy(Reader(made, layers, plain, few), contents)


class _Contents:
    """The objects that a copy depends on, and facts about them that can change."""

    def __init__(self, network: Network, *, with_versions: bool) -> None:
        self._with_versions = with_versions
        modules = [module for part in network.parts() for module in part.modules()]
        self._parts = network.parts()
        self._held = [
            held
            for module in modules
            for held in (module._parameters, module._buffers, module._modules)
        ]
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._objects = self._values()
        self._tensors = [each for each in self._objects if isinstance(each, Tensor)]
        self._facts = self._facts_now()

    def are_those_of(self, network: Network) -> bool:
        """Whether the network consists of the same objects, of the same types and devices."""
        parts, now = network.parts(), self._values()
        return (
            len(parts) == len(self._parts)
            and all(map(is_, parts, self._parts))
            and len(now) == len(self._objects)
            and all(map(is_, now, self._objects))
            and self._facts_now() == self._facts
        )

    def _values(self) -> list[object]:
        return list(chain.from_iterable(map(dict.values, self._held)))

    def _facts_now(self) -> list[object]:
        tensors = self._tensors
        lengths = [*map(len, self._held), *map(len, self._hooks)]
        versions = [version_of(each) for each in tensors] if self._with_versions else []
        types, devices = [each.dtype for each in tensors], [each.device for each in tensors]
        return [lengths, types, devices, versions]
