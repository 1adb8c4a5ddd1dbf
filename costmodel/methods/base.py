"""What a long-context method is to the cost model.

A method is a frozen dataclass of its parameters plus hooks that price it. It *covers* some mixers
and replaces their cache cost; every other mixer keeps its own (``costmodel.mixers``). When it acts
is part of a method (``STAGES``); methods whose stages do not overlap compose with "+"
(``stack.MethodStack``, which is what layout code talks to).

``state`` returns the sum over a group's layers. Operations stand for ONE layer; the caller
multiplies their ``count`` by ``group.n_layers``. Where layers of one group differ, amounts are the
group's mean (so totals stay exact), or ``count`` is the share of the layers that run the
operation.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from costmodel.architecture import Architecture, MixerGroup
from costmodel.errors import ConfigError
from costmodel.mixers import AbstractMixer, Attention
from costmodel.operation import Array, Operations
from costmodel.workload import Point

#: "prompt": rewrites the prompt before the model sees it; "prefill": changes attention over the
#: prompt; "evict": drops cached tokens; "store": changes how and where the others are kept and
#: read.
Stage = Literal["prompt", "prefill", "evict", "store"]
STAGE_ORDER: tuple[Stage, ...] = ("prompt", "prefill", "evict", "store")

#: Which mixers a method changes. "owned": attention with a cache of its own, windows included;
#: "unbounded": of those, the caches that grow without bound (windows and chunks are bounded already
#: and keep their own); "cache": any mixer with a cache of its own; "none": the model is unchanged.
Scope = Literal["owned", "unbounded", "cache", "none"]
_SCOPES: Mapping[Scope, str] = {
    "owned": "attention layers with a KV cache",
    "unbounded": "attention layers whose KV cache grows without bound (no window, no chunks)",
    "cache": "layers with a KV cache",
    "none": "the prompt alone",
}

#: The benchmark's settings (arXiv 2407.01527): share of the prompt that is kept.
PRESETS: Mapping[str, float] = {"2x": 0.5, "4x": 0.25, "6x": 0.17, "8x": 0.125}
Preset = Literal["2x", "4x", "6x", "8x"]

Mask = NDArray[np.bool_] | np.bool_ | bool


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Bytes a group of layers holds for the whole batch, by memory tier.

    device     in GPU memory
    host       in host memory
    allocated  GPU memory the implementation sets aside for it; None or NaN: ``device``, rounded
               to the engine's blocks
    """

    device: Array
    host: Array = 0.0
    allocated: Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AbstractMethod(ABC):
    """Base of all methods; subclasses are final, named in the file of the same name."""

    #: the name users type
    NAME: ClassVar[str]
    #: one line for listings
    TITLE: ClassVar[str]
    #: paper or upstream repository
    REFERENCE: ClassVar[str]
    #: which stages it takes; two methods that share one do not compose
    STAGES: ClassVar[frozenset[Stage]]
    #: when it acts, in words
    ACTS: ClassVar[str] = ""
    #: storage type of cache elements, as ``kv_dtype`` prints it ("int{bits}"); "": as they come
    STORES: ClassVar[str] = ""
    #: which mixers it changes
    SCOPE: ClassVar[Scope] = "owned"
    #: what it does not save, one sentence
    DOES_NOT_SAVE: ClassVar[str]
    #: engines and libraries in which it really runs today
    REALISED_BY: ClassVar[tuple[str, ...]] = ()
    #: engine -> the flags that switch it on there, for engines that have it built in
    ENGINE_FLAGS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    #: parameter name -> meaning, and which way it points
    PARAMETERS: ClassVar[Mapping[str, str]] = {}
    #: formula of the state, for ``methods show``
    STATE_FORMULA: ClassVar[str] = ""
    #: parameters that ``preset`` sets; empty for methods without presets
    PRESET_SETS: ClassVar[tuple[str, ...]] = ()
    #: priced only: there is no runnable twin
    COST_ONLY: ClassVar[bool] = False

    @property
    def parameters(self) -> dict[str, object]:
        """All parameters with their values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def resolved(self, context_tokens: int) -> Self:
        """The method with budgets as plain numbers for one context (presets depend on it)."""
        return self

    def covers(self, mixer: AbstractMixer) -> bool:
        """Whether the method changes what this mixer keeps or does."""
        if self.SCOPE == "none" or not mixer.HAS_KV:
            return False
        if not isinstance(mixer, Attention):
            return self.SCOPE == "cache"
        bounded = mixer.max_kv_tokens() is not None
        return mixer.owns_cache and not (bounded and self.SCOPE == "unbounded")

    def refusal(self, architecture: Architecture) -> str | None:
        """Why the method cannot run on this model, or None.

        The default refuses models without a single mixer that it would change.
        """
        if self.SCOPE == "none" or any(self.covers(g.mixer) for g in architecture.mixer_groups):
            return None
        kinds = sorted({g.mixer.KIND for g in architecture.mixer_groups})
        return (
            f"{self.NAME} acts on {_SCOPES[self.SCOPE]}, and {architecture.name} has none "
            f"(its mixers: {', '.join(kinds)})"
        )

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """Where the budgets hold everything, so that the method is full attention.

        There ``MethodStack`` prices the unmodified model. ``n_kv_layers`` is the number of the
        model's cache-keeping layers, for methods whose budget is in layers.
        """
        return False

    # Hooks over the prompt -------------------------------------------------------------------

    def prompt_tokens(self, prompt_tokens: Array) -> Array:
        """Tokens that reach the model ("prompt" stage)."""
        return prompt_tokens

    def prompt_operations(self, point: Point) -> Operations:
        """Work before the model sees the prompt; ``point.prompt_tokens`` is the ORIGINAL length."""
        return ()

    def prompt_weights_bytes(self) -> float:
        """Weights of a helper model, resident beside the model's own."""
        return 0.0

    def fed_tokens(self, point: Point) -> float:
        """Prompt tokens of a sequence that the implementation feeds at once; 0: no chunks of its
        own.
        """
        return 0.0

    # Hooks over the cache --------------------------------------------------------------------

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """What runs over the prompt between the projections.

        ``attention`` is what would run without this method: the mixer's own operations, or those of
        the method before it in a composition.
        """
        return attention

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """What a layer does once its prompt is attended: score, select, quantise, transfer."""
        return ()

    def tokens_left(self, group: MixerGroup, point: Point) -> Array:
        """Cached tokens per KV head after eviction ("evict" alone): what a store method sees."""
        return point.cached_tokens

    @abstractmethod
    def state(self, group: MixerGroup, point: Point) -> State:
        """What the group's layers hold with ``point.cached_tokens`` cached; summed over layers."""

    def prefill(self, group: MixerGroup, point: Point) -> Operations:
        """The whole prompt pass of one layer between the projections, compression included."""
        attention = self.prefill_attention(group, point, group.mixer.prefill(point))
        return attention + self.after_prefill(group, point)

    @abstractmethod
    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """One decode step of one layer that reads ``point.cached_tokens`` cached tokens."""


def attention_of(group: MixerGroup) -> Attention:
    """The group's mixer, which ``covers`` has established to be attention."""
    mixer = group.mixer
    assert isinstance(mixer, Attention)
    return mixer


def kept(budget: Array, tokens: Array) -> Array:
    """Tokens a budget keeps: a budget of at least the context equals full attention."""
    return np.minimum(budget, tokens)


def layer_bytes(mixer: Attention, point: Point, tokens: Array) -> Array:
    """Unquantised K and V of ``tokens`` tokens in one layer, whole batch: B t K (Hk + Hv) b."""
    return point.batch * tokens * (mixer.kv_elements_per_token() * point.kv_element_bytes)


def within_pass(operations: Operations, point: Point) -> Operations:
    """Operations over a prompt whose intermediates belong to its tokens: only those of one forward
    pass are alive at once.
    """
    share = point.pass_tokens / np.maximum(point.batch * point.prompt_tokens, 1.0)
    return tuple(replace(op, transient_bytes=op.transient_bytes * share) for op in operations)


def not_stored(attention: Operations, point: Point) -> Operations:
    """Prompt attention whose K and V are not what the cache keeps.

    The method writes its own state afterwards, so here K and V are one layer's transient.
    ``ideal``: they pass between fused kernels as activations; ``reference``: they are written and
    read back.
    """
    return tuple(
        replace(
            op,
            state_bytes=0.0,
            activation_bytes=op.activation_bytes
            + (op.state_bytes if point.level == "ideal" else 0.0),
            workspace_bytes=op.workspace_bytes
            + (0.0 if point.level == "ideal" else op.state_bytes),
            transient_bytes=op.transient_bytes + op.state_bytes,
        )
        for op in attention
    )


def check_at_least(method: str, minimum: float, **values: float) -> None:
    """Raise ``ConfigError`` for a parameter below its minimum."""
    for name, value in values.items():
        if value < minimum:
            raise ConfigError(f"{method}: expected {name} of at least {minimum:g}, got {value:g}")


def check_fraction(method: str, *, zero: bool = True, **values: float) -> None:
    """Raise ``ConfigError`` for a share outside 0..1 (``zero``: whether 0 is allowed)."""
    for name, value in values.items():
        if not (0 <= value <= 1) or (value == 0 and not zero):
            low = "0" if zero else "above 0"
            raise ConfigError(f"{method}: expected {name} from {low} to 1, got {value:g}")
