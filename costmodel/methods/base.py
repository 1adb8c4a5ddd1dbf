"""What a long-context method is to the cost model.

A method is a frozen dataclass of its parameters plus hooks that price it. It *covers* some mixers and
replaces their cache cost; every other mixer keeps its own (``costmodel.mixers``). Hooks return totals
for ONE layer, except that amounts may differ between layers: they receive the whole group and
return the group's sum in ``state``, and operations whose ``count`` is the number of layers.

When it acts is part of a method (``STAGES``); methods whose stages do not overlap compose with "+".
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, Self

import numpy as np

from costmodel.architecture import Architecture, MixerGroup
from costmodel.mixers import AbstractMixer, Attention
from costmodel.operation import Array, Operations
from costmodel.workload import Point

#: "prompt": rewrites the prompt before the model sees it; "prefill": changes attention over the prompt;
#: "cache": changes what is kept or read after it.
Stage = Literal["prompt", "prefill", "cache"]

#: The benchmark's settings (arXiv 2407.01527): share of the prompt that is kept.
PRESETS: Mapping[str, float] = {"2x": 0.5, "4x": 0.25, "6x": 0.17, "8x": 0.125}


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Bytes a group of layers holds for the whole batch, by memory tier.

    device     in GPU memory
    host       in host memory
    allocated  GPU memory the implementation sets aside for it; None: equal to ``device``, rounded
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
    #: when it acts
    STAGES: ClassVar[frozenset[Stage]]
    #: what it does not save, one sentence
    DOES_NOT_SAVE: ClassVar[str]
    #: engines and libraries in which it really runs today
    REALISED_BY: ClassVar[tuple[str, ...]] = ()
    #: parameter name -> (meaning, which way it points)
    PARAMETERS: ClassVar[Mapping[str, str]] = {}
    #: formula of the state, for ``methods show``
    STATE_FORMULA: ClassVar[str] = ""

    @property
    def parameters(self) -> dict[str, object]:
        """All parameters with their values."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def resolved(self, context_tokens: int) -> Self:
        """The method with budgets as plain numbers for one context (presets depend on it)."""
        return self

    def covers(self, mixer: AbstractMixer) -> bool:
        """Whether the method changes what this mixer keeps or does."""
        return isinstance(mixer, Attention)

    def refusal(self, architecture: Architecture) -> str | None:
        """Why the method cannot run on this model, or None.

        The default refuses models without a single covered mixer.
        """
        if any(self.covers(g.mixer) for g in architecture.mixer_groups):
            return None
        kinds = sorted({g.mixer.KIND for g in architecture.mixer_groups})
        return (
            f"{self.NAME} acts on {self.acts_on()}, and {architecture.name} has none "
            f"(its mixers: {', '.join(kinds)})"
        )

    def acts_on(self) -> str:
        """What ``covers`` looks for, in words."""
        return "attention layers with a KV cache"

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

    # Hooks over the cache --------------------------------------------------------------------

    @abstractmethod
    def state(self, group: MixerGroup, point: Point) -> State:
        """What the group's layers hold with ``point.cached_tokens`` cached; summed over layers."""

    @abstractmethod
    def prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Operations between the projections over the prompt, compression included.

        One operation stands for one layer; its ``count`` is multiplied by ``group.n_layers`` by the
        caller, so leave ``count`` the runs per layer (fractions allowed: a flush every R steps).
        """

    @abstractmethod
    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """The same for one decode step that reads ``point.cached_tokens`` cached tokens."""


def covers_unbounded(mixer: AbstractMixer) -> bool:
    """Attention whose cache grows without bound: what token-dropping methods act on. Windows and
    chunks are bounded already and keep their own cache.
    """
    return isinstance(mixer, Attention) and mixer.max_kv_tokens() is None and mixer.owns_cache


def kept(budget: Array, tokens: Array) -> Array:
    """Tokens a budget keeps: a budget of at least the context equals full attention."""
    return np.minimum(budget, tokens)
