"""A small real decoder built from an :class:`~costmodel.architecture.Architecture`.

    x = embedding[tokens]
    per layer:  x += mixer( rms_norm(x) );  x += mlp( rms_norm(x) )    (either may be absent)
                (several mixers of a layer read the same and are summed)
    logits = head( rms_norm(last x) )

Mixers and MLPs are in ``measure.mixers`` and ``measure.mlps``. Attention lives in the layer's cache
(``measure.methods``): it attends the prompt exactly and stores what the method stores, then attends
one new token per step in place; recurrent mixers keep a fixed state. Weights are random unless
given: dimensions decide cost, values do not. Prefill takes the whole prompt at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, linear

from costmodel.architecture import Architecture, Layer
from costmodel.errors import ConfigError
from costmodel.mlps import MoE
from measure.blocks import Block, blocks_of, outer_norms
from measure.config_numerics import numerics_of
from measure.methods.base import AbstractLayerCache
from measure.mixers.base import AbstractRunner, FixedState, Init, LayerState, Shape
from measure.mixers.rwkv5 import ChannelMixing
from measure.mlps import MLPRunner
from measure.numerics import Numerics, Rope
from measure.parts import Rotary, Tensors, rms, rope_table, scaled, softcap
from measure.step_clock import StepClock
from measure.weight_formats import PackedMatrix, packed

__all__ = [
    "TORCH_DTYPES",
    "Decoder",
    "LayerWeights",
    "Numerics",
    "Weights",
    "random_weights",
]

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: Standard deviation of random weights: activations stay of order one, far from inf and denormals.
_WEIGHT_SCALE = 0.02


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerWeights:
    """One layer by part; matrices as ``y = x W^T``, named by ``shapes`` of what runs them.

    norms  "mixer" and "mlp" before the blocks, "mixer_post" and "mlp_post" behind them; layer
           norms have biases besides ("mixer_bias", ...)
    shared, linears  of a ``SharedBlock``: the same tensors in every layer that shares them, and
           the layer's own
    """

    norms: Tensors
    mixers: tuple[Tensors, ...]
    mlp: Tensors
    shared: Tensors = field(default_factory=dict)
    linears: Tensors = field(default_factory=dict)

    def tensors(self) -> Iterator[Tensor]:
        """All of them, the parts of packed matrices too."""
        for part in (self.norms, *self.mixers, self.mlp, self.shared, self.linears):
            for value in part.values():
                yield from value.tensors() if isinstance(value, PackedMatrix) else (value,)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Weights:
    """All tensors of a decoder; ``head`` is ``embedding`` itself where they are tied.

    outer  the norms outside the layers as ``LayerWeights.norms``: "final", and "first" where the
           embedding is normed
    """

    embedding: Tensor  # [V, D]
    layers: tuple[LayerWeights, ...]
    outer: Tensors
    head: Tensor  # [V, D]

    @property
    def nbytes(self) -> int:
        """Bytes of the storages, each counted once."""
        tensors = [self.embedding, *self.outer.values(), self.head]
        tensors += [t for layer in self.layers for t in layer.tensors()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Plain (not packed) tensors by place and name."""
        yield "embedding", self.embedding
        yield from ((f"norm {name}", x) for name, x in self.outer.items())
        for i, layer in enumerate(self.layers):
            parts = {"norm": layer.norms, "mlp": layer.mlp, "shared": layer.shared}
            parts |= {"linear": layer.linears}
            parts |= {f"mixer {j}": tensors for j, tensors in enumerate(layer.mixers)}
            for part, tensors in parts.items():
                yield from ((f"layer {i} {part} {name}", x) for name, x in tensors.items())
        yield "head", self.head


def random_weights(
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    *,
    numerics: Numerics | None = None,
) -> Weights:
    """Weights of the true sizes, the same for the same seed."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return _made(architecture, numerics, lambda shape: random_tensor(shape, dtype, generator))


def check_shapes(
    architecture: Architecture, weights: Weights, *, numerics: Numerics | None = None
) -> None:
    """Raise ``ConfigError`` naming the first tensor that is missing or has another shape than the
    model's. Elements that need no data (the device ``meta``) are enough.
    """
    expected = _made(architecture, numerics, lambda s: torch.empty(s.sizes, device="meta"))
    present = dict(weights.named())
    for name, tensor in expected.named():
        found = present.get(name)
        if found is None or found.shape != tensor.shape:
            got = "none" if found is None else str(list(found.shape))
            raise ConfigError(
                f"checkpoint: {architecture.name} expects {name} of {list(tensor.shape)}, got {got}"
            )


def _made(
    architecture: Architecture, numerics: Numerics | None, draw: Callable[[Shape], Tensor]
) -> Weights:
    """Every tensor of the model, as ``draw`` makes it."""
    numerics = numerics or numerics_of(architecture.family)
    blocks = blocks_of(architecture, numerics)
    d, v = architecture.d_model, architecture.vocab_size

    def norms(names: Sequence[str]) -> Tensors:
        kinds: dict[str, Init] = {n: "zeros" if n.endswith("_bias") else "ones" for n in names}
        return {name: draw(Shape((d,), kind)) for name, kind in kinds.items()}

    def tensors(shapes: Mapping[str, Shape]) -> Tensors:
        return {name: draw(shape) for name, shape in shapes.items()}

    shared: dict[int, Tensors] = {}

    def layer(block: Block, spec: Layer) -> LayerWeights:
        if block.shared is not None and spec.shared_with not in shared:
            assert spec.shared_with is not None
            shared[spec.shared_with] = tensors(block.shared.shapes(d))
        return LayerWeights(
            norms=norms(block.norms(numerics)),
            mixers=tuple(tensors(runner.shapes(d)) for runner in block.mixers),
            mlp=tensors({} if block.mlp is None else block.mlp.shapes(d)),
            shared={} if spec.shared_with is None else shared[spec.shared_with],
            linears=tensors({} if block.shared is None else block.shared.own_shapes()),
        )

    table = draw(Shape((v, d)))
    return Weights(
        embedding=table,
        layers=tuple(map(layer, blocks, architecture.layers)),
        outer=norms(outer_norms(numerics)),
        head=table if architecture.tied_embeddings else draw(Shape((v, d))),
    )


def random_tensor(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One tensor, drawn as its shape says, where the generator is."""
    tensor = torch.empty(shape.sizes, dtype=dtype, device=generator.device)
    match shape.init:
        case "matrix":
            return tensor.normal_(0.0, _WEIGHT_SCALE, generator=generator)
        case "ones":
            return tensor.fill_(1.0)
        case "zeros":
            return tensor.zero_()
        case "log_decay":  # decay rates from 1 to 16
            return tensor.uniform_(1.0, 16.0, generator=generator).log_()
        case "step":  # softplus gives step sizes around 0.01
            return tensor.uniform_(-6.0, -3.0, generator=generator)


def pack_weights(
    architecture: Architecture,
    weights: Weights,
    weight_dtype: str,
    *,
    numerics: Numerics | None = None,
) -> Weights:
    """The same weights with the matrices of mixers and MLPs in ``weight_dtype``."""
    numerics = numerics or numerics_of(architecture.family)
    d = architecture.d_model
    done: dict[int, PackedMatrix] = {}  # tensors that several layers share stay shared

    def pack(tensor: Tensor) -> PackedMatrix:
        if id(tensor) not in done:
            done[id(tensor)] = packed(tensor, weight_dtype)
        return done[id(tensor)]

    def part(tensors: Tensors, shapes: Mapping[str, Shape]) -> Tensors:
        return {
            name: pack(tensor) if shapes[name].packable else tensor
            for name, tensor in tensors.items()
        }

    layers = [
        replace(
            layer,
            mixers=tuple(
                part(tensors, runner.shapes(d))
                for tensors, runner in zip(layer.mixers, block.mixers, strict=True)
            ),
            mlp=part(layer.mlp, {} if block.mlp is None else block.mlp.shapes(d)),
            shared=part(layer.shared, {} if block.shared is None else block.shared.shapes(d)),
            linears=part(layer.linears, {} if block.shared is None else block.shared.own_shapes()),
        )
        for block, layer in zip(blocks_of(architecture, numerics), weights.layers, strict=True)
    ]
    return replace(weights, layers=tuple(layers))


class Decoder:
    """Runs a prompt, then one token at a time; the caches carry everything between calls.

    ``n_positions`` is the longest sequence the rotary tables cover. Without ``numerics`` the
    family's defaults serve. Steps read their position from ``clock``, on the device.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        *,
        n_positions: int,
        numerics: Numerics | None = None,
    ) -> None:
        self.numerics = numerics or numerics_of(architecture.family, d_model=architecture.d_model)
        self.blocks = blocks_of(architecture, self.numerics)
        self.n_positions = n_positions
        self.architecture = architecture
        self.weights = weights
        dtype, device = weights.embedding.dtype, weights.embedding.device
        self.clock = StepClock(device, n_positions - 1)
        self.embedding_scale = torch.tensor(self.numerics.embedding_scale, dtype=dtype)
        self.tables: dict[tuple[Rope, int], Rotary] = {
            mixer.rope: rope_table(n_positions, mixer.rope[1], mixer.rope[0], dtype, device)
            for block in dict.fromkeys(self.blocks)
            for mixer in block.runners
            if mixer.rope is not None
        }

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, caches: Sequence[LayerState]) -> Tensor:
        """Run the prompt [B, S] into empty caches; logits [B, V] of the last token."""
        return self._forward(tokens, caches, first=True)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, caches: Sequence[LayerState]) -> Tensor:
        """Run one token per sequence [B, 1] after what the caches hold; logits [B, V]."""
        self.clock.at(caches[0].n_tokens if caches else 0)
        logits = self._forward(tokens, caches, first=False)
        self.clock.advance()
        return logits

    def why_not_captured(self) -> str:
        """Say what of a step outside the caches only the host can decide; "" where nothing is."""
        mlps = [block.mlp for block in self.blocks]
        mlps += [block.shared.mlp for block in self.blocks if block.shared is not None]
        if any(isinstance(m, MLPRunner) and isinstance(m.mlp, MoE) for m in mlps):
            return "the host reads which experts the router chose"
        return ""

    def _forward(self, tokens: Tensor, caches: Sequence[LayerState], *, first: bool) -> Tensor:
        weights, numerics = self.weights, self.numerics
        position = 0 if first or not caches else caches[0].n_tokens
        end = position + tokens.shape[1]
        if end > self.n_positions:
            raise ConfigError(
                f"the decoder was built for {self.n_positions} positions and is asked for {end}"
            )
        x = self._embed(tokens)
        if numerics.embedding_scale != 1.0:
            x = x * self.embedding_scale
        if numerics.first_norm:
            x = self._norm(x, weights.outer, "first")
        # kept only where a layer reads it again: at the peak every tensor of [B, S, D] counts
        embedded = x if any(block.shared is not None for block in self.blocks) else None
        remaining = iter(caches)
        if first:
            tables = {key: (cos[:end], sin[:end]) for key, (cos, sin) in self.tables.items()}
        else:
            now = self.clock.position
            tables = {
                key: (cos.index_select(0, now), sin.index_select(0, now))
                for key, (cos, sin) in self.tables.items()
            }

        def table_of(runner: AbstractRunner) -> Rotary | None:
            return None if runner.rope is None else tables[runner.rope]

        for block, layer in zip(self.blocks, weights.layers, strict=True):
            cache = None
            if block.mixers:
                read = x
                if block.shared is not None:
                    cache, table = next(remaining), table_of(block.shared.attention)
                    assert isinstance(cache, AbstractLayerCache)
                    assert embedded is not None
                    w = {**layer.shared, **layer.linears}
                    read = x + block.shared.run(x, embedded, w, cache, table, first)
                h, mixed = self._norm(read, layer.norms, "mixer"), None
                for mixer, tensors in zip(block.mixers, layer.mixers, strict=True):
                    cache = next(remaining)
                    out = mixer.run(h, tensors, cache, table_of(mixer), first)
                    mixed = out if mixed is None else mixed + out
                assert mixed is not None
                kept, added = block.residual(numerics)
                x = scaled(h if numerics.residual_normed else x, kept)
                x = x + scaled(self._post(self._joined(mixed), layer.norms, "mixer_post"), added)
                del read, h, out, mixed  # the MLP is where memory peaks
            if block.mlp is not None:
                h = self._norm(x, layer.norms, "mlp")
                x = scaled(h if numerics.residual_normed else x, numerics.mlp_residual[0])
                if isinstance(block.mlp, ChannelMixing):
                    assert isinstance(cache, FixedState)
                    h = block.mlp.run(h, layer.mlp, cache)
                else:
                    h = block.mlp.run(h, layer.mlp)
                h = self._post(self._joined(h), layer.norms, "mlp_post")
                x = x + scaled(h, numerics.mlp_residual[1])
        last = self._norm(x[:, -1], weights.outer, "final")
        scores = scaled(self._scores(last), numerics.logit_scale)
        return softcap(scores, numerics.final_softcap)

    def _embed(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weights.embedding)

    def _joined(self, part: Tensor) -> Tensor:
        """What a block adds to the stream; where several processes share it, the sum of theirs."""
        return part

    def _scores(self, last: Tensor) -> Tensor:
        return linear(last, self.weights.head)

    def _norm(self, x: Tensor, norms: Tensors, name: str) -> Tensor:
        weight = norms[name]
        if self.numerics.layer_norm:
            bias = norms[f"{name}_bias"]
            return layer_norm(x, weight.shape, weight, bias, self.numerics.norm_eps)
        return rms(x, weight, self.numerics.norm_eps)

    def _post(self, x: Tensor, norms: Tensors, name: str) -> Tensor:
        return self._norm(x, norms, name) if name in norms else x
