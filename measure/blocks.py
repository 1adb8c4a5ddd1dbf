"""What runs every layer of an architecture: its mixers, its MLP, its norms."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from costmodel.architecture import Architecture, Layer
from costmodel.errors import NotApplicableError
from measure.config_numerics import numerics_of
from measure.mixers import runner_of
from measure.mixers.base import AbstractRunner, RecurrentRunner
from measure.mixers.rwkv5 import ChannelMixing
from measure.mlps import MLPRunner
from measure.numerics import Numerics
from measure.shared_block import SharedBlock


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What runs one layer; a layer has mixers, an MLP, or both."""

    mixers: tuple[AbstractRunner, ...]
    mlp: MLPRunner | ChannelMixing | None
    shared: SharedBlock | None = None

    @classmethod
    def of(cls, layer: Layer, numerics: Numerics) -> "Block":
        """Raises ``NotApplicableError`` saying what of the layer cannot be run."""
        mixing = ChannelMixing.of(layer)
        if mixing is not None:
            return cls((runner_of(layer.mixers[0], numerics),), mixing)
        if layer.shared_with is not None:
            own = tuple(runner_of(mixer, numerics) for mixer in layer.mixers[1:])
            return cls(own, None, SharedBlock(layer, numerics))
        if len(layer.mlps) > 1 or layer.linears:
            raise NotApplicableError(f"has {len(layer.mlps)} MLPs, or further matrices")
        return cls(
            tuple(runner_of(mixer, numerics) for mixer in layer.mixers),
            MLPRunner(layer.mlps[0], numerics) if layer.mlps else None,
        )

    @property
    def runners(self) -> tuple[AbstractRunner, ...]:
        """Mixers in the order of their caches."""
        return self.mixers if self.shared is None else (self.shared.attention, *self.mixers)

    def at_layer(self, index: int, n_layers: int) -> "Block":
        """The same at its depth."""
        placed = tuple(mixer.at_layer(index, n_layers) for mixer in self.mixers)
        same = all(a is b for a, b in zip(placed, self.mixers, strict=True))
        return self if same else Block(placed, self.mlp, self.shared)

    def norms(self, numerics: Numerics) -> tuple[str, ...]:
        """Names of the layer's norms."""
        blocks = ["mixer"] if self.mixers else []
        blocks += ["mlp"] if self.mlp is not None else []
        blocks += [f"{n}_post" for n in blocks if numerics.sandwich]
        return tuple(_with_biases(blocks, numerics))

    def residual(self, numerics: Numerics) -> tuple[float, float]:
        """Factors of the stream and of what the mixers add to it."""
        recurrent = any(isinstance(mixer, RecurrentRunner) for mixer in self.mixers)
        return numerics.recurrent_residual if recurrent else numerics.attention_residual

    def other_parameters(self, d_model: int, numerics: Numerics) -> int:
        """Elements outside mixer and MLP."""
        extra = self.mlp.other_parameters(d_model) if isinstance(self.mlp, ChannelMixing) else 0
        return len(self.norms(numerics)) * d_model + extra


def _with_biases(names: Sequence[str], numerics: Numerics) -> Iterator[str]:
    for name in names:
        yield name
        if numerics.layer_norm:
            yield f"{name}_bias"


def outer_norms(numerics: Numerics) -> tuple[str, ...]:
    """Names of the norms outside the layers."""
    names = ["first", "final"] if numerics.first_norm else ["final"]
    return tuple(_with_biases(names, numerics))


def blocks_of(architecture: Architecture, numerics: Numerics) -> tuple[Block, ...]:
    """What runs every layer; raises ``NotApplicableError`` for a model this engine cannot run."""
    built: dict[Layer, Block] = {}
    for index, layer in enumerate(architecture.layers):
        if layer in built:
            continue
        try:
            built[layer] = block = Block.of(layer, numerics)
        except NotApplicableError as error:
            raise NotApplicableError(
                f"the torch engine cannot run {architecture.name}: layer {index} {error}"
            ) from None
        expected = block.other_parameters(architecture.d_model, numerics)
        if layer.other_parameters != expected:
            raise NotApplicableError(
                f"the torch engine cannot run {architecture.name}: layer {index} has norms of "
                f"{layer.other_parameters} elements, not {expected}"
            )
    outer = len(outer_norms(numerics)) * architecture.d_model
    if architecture.head_bias or architecture.other_parameters != outer:
        raise NotApplicableError(
            f"the torch engine cannot run {architecture.name}: it has a head bias, or more than "
            "one norm behind the layers"
        )
    n = len(architecture.layers)
    return tuple(built[layer].at_layer(i, n) for i, layer in enumerate(architecture.layers))


def check_supported(architecture: Architecture) -> None:
    """Raise ``NotApplicableError`` for a model this engine cannot run."""
    blocks_of(architecture, numerics_of(architecture.family))
