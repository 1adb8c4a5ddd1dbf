"""What a runnable method is: the cache of one attention layer, and attention over it.

A twin attends the prompt, stores what its method stores, and then attends one new token per step
against what it kept, appending in place. ``n_tokens`` counts the tokens of the sequence seen so
far, whether or not they are still held. Everything is batched; heads are grouped (GQA) by folding
the group into the query length, so K and V are never repeated.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from costmodel.errors import NotApplicableError
from costmodel.methods.base import AbstractMethod
from costmodel.mixers import Attention
from measure.kernels._steps import StepState
from measure.methods.buffers import GrowingBuffer
from measure.numerics import Rope
from measure.parts import QUERY_BLOCK, attend_prompt, rotate, shared_rope_table
from measure.step_clock import StepClock

#: ``best``: the fastest correct form here; ``reference``: the operations of the published code.
Realisation = Literal["reference", "best"]


def check_form(name: str, forms: frozenset[Realisation], realisation: Realisation) -> None:
    """Raise ``NotApplicableError`` for a form that a method does not have here."""
    if realisation not in forms:
        raise NotApplicableError(
            f"{name}: expected realisation {' or '.join(sorted(forms))}, got {realisation}"
        )


class AbstractPromptAttention(ABC):
    """What a method that only changes attention over the prompt runs in its place."""

    NAME: ClassVar[str]
    #: as for a cache
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best"})
    PUBLISHED_AS: ClassVar[str] = ""

    def __init__(self, method: AbstractMethod, realisation: Realisation = "best") -> None:
        check_form(self.NAME, self.REALISATIONS, realisation)
        self.is_reference = realisation == "reference"
        self._configure(method)

    @abstractmethod
    def _configure(self, method: AbstractMethod) -> None:
        """Read the method's parameters."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Q [B, N, S, H], k and v [B, K, S, H] -> [B, N, S, H], causal."""


class AbstractLayerCache(ABC):
    """The cache of one layer, for all sequences of the batch.

    Parameters
    ----------
    method
        Parameters, as the cost model has them.
    mixer
        The layer's attention.
    reserve_tokens
        Sequence length to make room for; 0: storage grows exactly with what is held.
    realisation
        Which form runs; raises ``NotApplicableError`` where the method has no such form here.
    """

    NAME: ClassVar[str]
    #: forms that this twin has
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best"})
    #: what ``reference`` runs, and where it does not do as the published code; for the docs
    PUBLISHED_AS: ClassVar[str] = ""
    #: whether it takes queries and keys as projected and turns them itself (``turned``)
    ROTATES: bool = False
    #: what attends the prompt in the place of exact attention
    prompt_attention: AbstractPromptAttention | None = None
    #: place among the model's caches, and how many it has
    layer = 0
    n_kv_layers = 1
    #: the cache whose step comes next
    successor: "AbstractLayerCache | None" = None
    #: rotary embedding of the queries and keys it is given; None: unknown, or none
    rope: Rope | None = None
    #: decode with the kernels of ``measure.kernels``; set where they can run (engine lccost)
    fused = False
    #: what those kernels keep on the device, once a step was run
    step_state: StepState | None = None
    #: the model's position on the device; None: the cache is used alone
    clock: StepClock | None = None
    #: steps have one shape and read their place from the clock, so that one can be captured
    fixed_shapes = False

    def __init__(
        self,
        method: AbstractMethod,
        mixer: Attention,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        reserve_tokens: int = 0,
        realisation: Realisation = "best",
    ) -> None:
        check_form(self.NAME, self.REALISATIONS, realisation)
        self.realisation = realisation
        self.mixer = mixer
        self.batch = batch
        self.dtype = dtype
        self.device = device
        self.n_tokens = 0
        self._build(method)
        if reserve_tokens:
            self.reserve(reserve_tokens)

    @abstractmethod
    def _build(self, method: AbstractMethod) -> None:
        """Make the empty buffers."""

    @abstractmethod
    def _buffers(self) -> Iterator[GrowingBuffer]:
        """All buffers, each once: what the layer holds between steps."""

    def place(self, layer: int, n_kv_layers: int, rope: Rope | None = None) -> None:
        """Say which of the model's caches this is, and how its queries and keys were rotated."""
        self.layer, self.n_kv_layers, self.rope = layer, n_kv_layers, rope

    def link(self, successor: "AbstractLayerCache") -> None:
        """Say which cache's step comes next, for what can begin before it does."""
        self.successor = successor

    def keep_time(self, clock: StepClock) -> None:
        """Read positions from ``clock``, which moves on once a step, after the last cache."""
        self.clock = clock

    def now(self) -> Tensor:
        """Tokens seen before this step, [1] on the device."""
        if self.clock is None:
            return torch.full((1,), self.n_tokens, dtype=torch.int64, device=self.device)
        return self.clock.behind(self.clock.host - self.n_tokens)

    def hold_shapes(self) -> str:
        """Give all steps from here on one shape, for a capture; say why that cannot be, else "".

        The steps must have room, and the cache is filled as it will be.
        """
        reason = self._why_shapes_change()
        self.fixed_shapes = not reason
        for buffer in self._buffers() if self.fixed_shapes else ():
            buffer.zero_room()
        return reason

    def release_shapes(self) -> None:
        """Steps have the shapes of what is held again."""
        self.fixed_shapes = False

    @abstractmethod
    def _why_shapes_change(self) -> str:
        """Say what of a step here only the host can decide; "" where nothing is."""

    @abstractmethod
    def reserve(self, n_tokens: int) -> None:
        """Make room for a sequence of ``n_tokens``; what is held stays."""

    def make_room(self, n_prompt: int, n_more: int) -> None:
        """Make room for a prompt and the tokens that follow it, once the cache is placed."""
        self.reserve(n_prompt + n_more)
        if self.ROTATES and self.rope is not None:  # else the first step would make the table
            size = self.mixer.head_dim
            shared_rope_table(n_prompt + n_more, size, self.rope, self.dtype, self.device)

    @abstractmethod
    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep a prompt's K and V [B, K, S, H] the method's way; the cache is empty before."""

    @abstractmethod
    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append one token and attend it to all held ones and itself.

        q [B, N, 1, H], k and v [B, K, 1, H] -> [B, N, 1, H].
        """

    @abstractmethod
    def snapshot(self) -> Any:
        """Remember what ``restore`` needs to undo the next step."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:
        """Go back to the moment of the snapshot, at most one step ago."""

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend the prompt exactly and store it; [B, N, S, H] and [B, K, S, H] -> [B, N, S, H]."""
        out = self.attend_prompt(q, k, v)
        self.store(k, v)
        return out

    def attend_prompt(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend the prompt exactly, through the layer's window where it has one."""
        if self.ROTATES:
            positions = torch.arange(q.shape[2], device=q.device)
            q, k = (self.turned(x, positions, q.shape[2]) for x in (q, k))
        if self.prompt_attention is not None:
            return self.prompt_attention.attend(q, k, v)
        mixer = self.mixer
        return attend_prompt(
            q,
            k,
            v,
            window=mixer.window_tokens,
            chunk=mixer.chunk_tokens,
            block=q.shape[2] if self.is_reference else QUERY_BLOCK,
        )

    def turned(self, x: Tensor, positions: Tensor, longest: int | None = None) -> Tensor:
        """Turn ``x`` [B, heads, n, H] as the model's rotary embedding does at ``positions``: [n],
        or [B, 1, n] where every sequence has its own. All are below ``longest``; where the host
        does not know that, it asks the device and waits.
        """
        if self.rope is None:
            return x
        cos, sin = self._table(x, positions, longest)
        return rotate(x, (cos, sin), interleaved=self.rope.interleaved)

    def turned_back(self, x: Tensor, positions: Tensor, longest: int | None = None) -> Tensor:
        """Undo ``turned``."""
        if self.rope is None:
            return x
        cos, sin = self._table(x, positions, longest)
        # an amplitude multiplies both ways
        return rotate(x, (cos, -sin), interleaved=self.rope.interleaved) / self.rope.amplitude**2

    def _table(self, x: Tensor, positions: Tensor, longest: int | None) -> tuple[Tensor, Tensor]:
        assert self.rope is not None
        n = int(positions.max()) + 1 if longest is None else longest
        cos, sin = shared_rope_table(n, x.shape[-1], self.rope, x.dtype, x.device)
        if positions.dim() > 1:
            return cos[positions], sin[positions]
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def reset_steps(self) -> None:
        """Put the device's count of tokens back too, whatever graphs were replayed."""
        if self.step_state is not None:
            self.step_state.reset(self.n_tokens)

    def clear(self) -> None:
        """Empty the cache; the room stays."""
        self.n_tokens = 0
        for buffer in self._buffers():
            buffer.clear()
        self.reset_steps()

    def fill(self, n_tokens: int, seed: int = 0) -> None:
        """Empty the cache, then store a random prompt of ``n_tokens`` without computing one."""
        self.clear()
        shape = (self.batch, self.mixer.n_kv_heads, n_tokens, self.mixer.head_dim)
        generator = torch.Generator(device=self.device).manual_seed(seed)
        k, v = (
            torch.empty(shape, dtype=self.dtype, device=self.device).normal_(generator=generator)
            for _ in range(2)
        )
        self.store(k, v)

    @property
    def storage_bytes(self) -> int:
        """Bytes of all storages, room included."""
        return sum(b.storage_bytes for b in self._buffers())

    @property
    def held_bytes(self) -> int:
        """Bytes of what is in use."""
        return sum(b.held_bytes for b in self._buffers())

    @property
    def host_bytes(self) -> int:
        """Bytes in use in host memory."""
        return 0

    @property
    def is_reference(self) -> bool:
        """Whether the operations of the published code are run."""
        return self.realisation == "reference"

    def fold(self, q: Tensor) -> Tensor:
        """[B, N, 1, H] -> [B, K, G, H]: the G query heads of a KV head as G queries."""
        return q.reshape(self.batch, self.mixer.n_kv_heads, -1, q.shape[-1])

    def unfold(self, out: Tensor) -> Tensor:
        """[B, K, G, H] -> [B, N, 1, H]."""
        return out.reshape(self.batch, self.mixer.n_heads, 1, out.shape[-1])
