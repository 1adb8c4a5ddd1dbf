"""What a model is: ordered layers, each with mixers and MLPs; no hardware, no method.

``load_architecture`` reads a bundled name or alias, a ``config.json``, a folder holding one, or
(with the ``hub`` extra, online) a hub id. Counts are exact: ``n_parameters`` equals the checkpoint.
"""

import functools
from collections import Counter
from dataclasses import dataclass, replace

from costmodel.errors import NotApplicableError
from costmodel.mixers.base import AbstractMixer, Linear
from costmodel.mlps import MLP, MoE


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One block. Several mixers (or MLPs) in one layer run on the same input side by side.

    other_parameters  norms and whatever else the block stores outside its mixers and MLPs
    linears           matrices the block itself applies to every token (adapters, gates)
    shared_with       index in ``Architecture.shared_layers`` of the weight set the layer uses;
                      those mixers and MLPs are stored once but read by every layer that uses them.
                      What else the layer has (norms, linears, further mixers) is its own
    """

    mixers: tuple[AbstractMixer, ...]
    mlps: tuple[MLP, ...] = ()
    other_parameters: int = 0
    linears: tuple[Linear, ...] = ()
    shared_with: int | None = None

    def sharded(self, tp: int) -> "Layer":
        """The part one of ``tp`` GPUs holds; norms and adapters replicate."""
        return replace(
            self,
            mixers=tuple(m.sharded(tp) for m in self.mixers),
            mlps=tuple(m.sharded(tp) for m in self.mlps),
        )


@dataclass(frozen=True, slots=True)
class MixerGroup:
    """Identical mixers. ``indices`` are their ordinals among all cache-keeping mixers
    (empty for fixed-state mixers); ``n_kv_layers`` is how many of those the model has.
    """

    mixer: AbstractMixer
    n_layers: int
    indices: tuple[int, ...]
    n_kv_layers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder-only language model.

    name               alias, as JSON prints it
    hub_id             full id of the checkpoint, or the path it was read from
    family             the config's model_type
    shared_layers      weight sets that several layers use, stored once (Zamba2)
    other_parameters   final norm, position tables and the like, outside layers and embeddings
    tied_embeddings    the LM head is the embedding matrix
    head_bias          elements of an LM-head bias
    active_adjustment  elements to add to ``n_active_parameters`` (see its definition)
    dtype              dtype of the checkpoint's 16-bit (or 32-bit) tensors
    quantization       the config's ``quantization_config`` as (key, value) pairs, nested objects
                       the same, lists as tuples; ``dict(quantization)`` reads it; None without one
    notes              what a reader of the numbers should know
    assumed            True when ``--assume`` replaced the config's own family
    """

    name: str
    hub_id: str
    family: str
    d_model: int
    vocab_size: int
    layers: tuple[Layer, ...]
    shared_layers: tuple[Layer, ...] = ()
    other_parameters: int = 0
    embedding_parameters: int = 0
    tied_embeddings: bool = False
    head_bias: int = 0
    active_adjustment: int = 0
    dtype: str = "bf16"
    quantization: tuple[tuple[str, object], ...] | None = None
    max_context_tokens: int | None = None
    source: str = ""
    confidence: str = ""
    notes: tuple[str, ...] = ()
    assumed: bool = False

    def __hash__(self) -> int:
        """Cheap: layers are compared only when the rest is equal."""
        return hash((self.name, self.hub_id, self.d_model, self.vocab_size, len(self.layers)))

    @property
    def n_layers(self) -> int:
        """Blocks, as ``num_hidden_layers`` counts them."""
        return len(self.layers)

    @property
    def mixer_groups(self) -> tuple[MixerGroup, ...]:
        """Identical mixers together, in order of first appearance."""
        return _mixer_groups(self)

    @property
    def mlp_groups(self) -> tuple[tuple[MLP, int], ...]:
        """Identical MLPs with their number."""
        return _mlp_groups(self)

    @property
    def linear_groups(self) -> tuple[tuple[Linear, int], ...]:
        """All per-token matrices outside routed experts and head, with how often a pass uses
        them.
        """
        return _linear_groups(self)

    @property
    def stored_layers(self) -> tuple[Layer, ...]:
        """Layers whose sum is what the checkpoint stores: shared weight sets once, then every layer
        with only what is its own.
        """
        own = (
            x if x.shared_with is None else _without(x, self.shared_layers[x.shared_with])
            for x in self.layers
        )
        return (*self.shared_layers, *own)

    def _layer_parameters(self, layer: Layer, *, active: bool) -> int:
        d = self.d_model
        total = layer.other_parameters + sum(x.n_parameters for x in layer.linears)
        for mixer in layer.mixers:
            total += sum(x.n_parameters for x in mixer.linears(d)) + mixer.other_parameters(d)
        for mlp in layer.mlps:
            total += sum(x.n_parameters for x in mlp.linears(d)) + mlp.other_parameters(d)
            if isinstance(mlp, MoE):
                experts = sum(x.n_parameters for x in mlp.expert_linears(d))
                total += experts * mlp.top_k // mlp.n_experts if active else experts
        return total

    def _count(self, *, active: bool) -> int:
        total = sum(
            n * self._layer_parameters(x, active=active)
            for x, n in Counter(self.stored_layers).items()
        )
        embedding = self.embedding_parameters or self.vocab_size * self.d_model
        head = 0 if self.tied_embeddings else self.vocab_size * self.d_model
        return total + embedding + head + self.head_bias + self.other_parameters

    @property
    def n_parameters(self) -> int:
        """Parameters of the checkpoint (text tower), ties counted once, MTP heads not counted."""
        return _parameters(self, False)

    @property
    def n_active_parameters(self) -> int:
        """Parameters a token uses: all but the routed experts it does not visit. Includes the
        embedding and the head (published figures often leave them out).
        """
        return _parameters(self, True) + self.active_adjustment

    def sharded(self, tp: int) -> "Architecture":
        """What one of ``tp`` tensor-parallel GPUs holds; raises ``NotApplicableError``."""
        if tp == 1:
            return self
        return _sharded(self, tp)


def _without(layer: Layer, shared: Layer) -> Layer:
    """The layer less the mixers and MLPs of a shared weight set."""
    return replace(
        layer,
        mixers=tuple(m for m in layer.mixers if m not in shared.mixers),
        mlps=tuple(m for m in layer.mlps if m not in shared.mlps),
        shared_with=None,
    )


@functools.lru_cache(maxsize=64)
def _sharded(architecture: Architecture, tp: int) -> Architecture:
    try:
        return replace(
            architecture,
            layers=tuple(x.sharded(tp) for x in architecture.layers),
            shared_layers=tuple(x.sharded(tp) for x in architecture.shared_layers),
        )
    except NotApplicableError as error:
        raise NotApplicableError(
            f"{architecture.name} does not shard over {tp} GPUs: {error}"
        ) from None


@functools.lru_cache(maxsize=256)
def _mixer_groups(architecture: Architecture) -> tuple[MixerGroup, ...]:
    members: dict[AbstractMixer, list[int]] = {}
    n_kv = 0
    for mixer in (m for layer in architecture.layers for m in layer.mixers):
        ordinals = members.setdefault(mixer, [])
        ordinals.append(n_kv if mixer.HAS_KV else -1)
        n_kv += mixer.HAS_KV
    return tuple(
        MixerGroup(mixer, len(x), tuple(i for i in x if i >= 0), n_kv)
        for mixer, x in members.items()
    )


@functools.lru_cache(maxsize=256)
def _mlp_groups(architecture: Architecture) -> tuple[tuple[MLP, int], ...]:
    return tuple(Counter(m for layer in architecture.layers for m in layer.mlps).items())


@functools.lru_cache(maxsize=256)
def _linear_groups(architecture: Architecture) -> tuple[tuple[Linear, int], ...]:
    d = architecture.d_model
    counts: Counter[Linear] = Counter()
    for layer, n in Counter(architecture.layers).items():
        for linear in layer.linears:
            counts[linear] += n
        for part in (*layer.mixers, *layer.mlps):
            for linear in part.linears(d):
                counts[linear] += n
    return tuple(counts.items())


@functools.lru_cache(maxsize=512)
def _parameters(architecture: Architecture, active: bool) -> int:
    return architecture._count(active=active)
