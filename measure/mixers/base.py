"""What running a mixer takes: the shapes of its tensors, its cache, and one call for both phases.

Recurrent mixers keep a :class:`FixedState`: an fp32 state, and the last kernel - 1 columns of the
convolution (or the shifted inputs) in the model's dtype, so that what is held equals
``state_bytes`` to the byte.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from costmodel.mixers import Linear
from measure.numerics import Numerics, Rope
from measure.parts import Rotary, Tensors
from measure.step_clock import StepClock

#: Elements, and fewest tokens, that an associative scan takes at once: 160 to 256 KiB in fp32. The
#: whole of 2,048 tokens x 1,280 channels took three times as long (Xeon with 2 MiB of L2).
PIECE_ELEMENTS, SHORTEST_PIECE = 2**16, 8
#: How random values are drawn: weights, norms, biases, log decays, step-size biases.
Init = Literal["matrix", "ones", "zeros", "log_decay", "step"]


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a tensor, how its random values are drawn, and whether weight formats pack it."""

    sizes: tuple[int, ...]
    init: Init = "matrix"
    packable: bool = False

    @classmethod
    def of(cls, matrix: Linear) -> "Shape":
        """One copy of a matrix."""
        return cls((matrix.n_out, matrix.n_in), packable=matrix.quantisable)


Shapes = dict[str, Shape]


class LayerState(Protocol):
    """What the engine and the observer need of any cache."""

    @property
    def n_tokens(self) -> int:
        """Tokens seen, whether or not they are still held."""

    @property
    def storage_bytes(self) -> int:
        """Bytes of all storages."""

    @property
    def held_bytes(self) -> int:
        """Bytes of what is in use."""

    def keep_time(self, clock: StepClock) -> None:
        """Read the position of a step from ``clock``."""

    def hold_shapes(self) -> str:
        """Give all steps one shape, for a capture; say why that cannot be, else ""."""

    def release_shapes(self) -> None:
        """Undo ``hold_shapes``."""

    def reset_steps(self) -> None:
        """Have the device's counts be the host's again, whatever graphs were replayed."""

    def clear(self) -> None:
        """Empty it; the room stays."""

    def fill(self, n_tokens: int, seed: int = 0) -> None:
        """Hold a random prompt without computing one."""

    def snapshot(self) -> Any:
        """Remember what ``restore`` needs to undo the next step."""

    def restore(self, snapshot: Any) -> None:
        """Go back to the moment of the snapshot."""


class FixedState:
    """Recurrent state of one layer; its size does not depend on the tokens seen.

    state    fp32 [B, ...]; columns  [B, channels, kernel - 1] in the model's dtype
    """

    #: scan prompts with the kernels of ``measure.kernels``; set where they can run (engine lccost)
    fused = False

    def __init__(
        self,
        state: tuple[int, ...],
        columns: tuple[int, int],
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.state = torch.zeros(batch, *state, dtype=torch.float32, device=device)
        self.columns = torch.zeros(batch, *columns, dtype=dtype, device=device)
        self.n_tokens = 0

    @property
    def storage_bytes(self) -> int:
        """Bytes of both storages."""
        return sum(x.untyped_storage().nbytes() for x in (self.state, self.columns))

    @property
    def held_bytes(self) -> int:
        """All of it, always."""
        return self.storage_bytes

    def keep_time(self, clock: StepClock) -> None:
        """Nothing depends on the position."""

    def hold_shapes(self) -> str:
        """It has only one."""
        return ""

    def release_shapes(self) -> None:
        """There is nothing to undo."""

    def reset_steps(self) -> None:
        """There are no counts on the device."""

    def clear(self) -> None:
        """Back to the state before the first token."""
        self.state.zero_()
        self.columns.zero_()
        self.n_tokens = 0

    def fill(self, n_tokens: int, seed: int = 0) -> None:
        """Random contents."""
        generator = torch.Generator(device=self.state.device).manual_seed(seed)
        self.state.normal_(0.0, 0.1, generator=generator)
        self.columns.normal_(generator=generator)
        self.n_tokens = n_tokens

    def snapshot(self) -> tuple[int, Tensor, Tensor]:
        """Copies of both."""
        return self.n_tokens, self.state.clone(), self.columns.clone()

    def restore(self, snapshot: tuple[int, Tensor, Tensor]) -> None:
        """Put the copies back."""
        self.n_tokens = snapshot[0]
        self.state.copy_(snapshot[1])
        self.columns.copy_(snapshot[2])

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Causal depthwise convolution of x [B, S, C] after the columns held, which move on."""
        kernel = weight.shape[-1]
        inputs = torch.cat((self.columns, x.transpose(1, 2)), dim=-1)
        self.columns.copy_(inputs[..., inputs.shape[-1] - (kernel - 1) :])
        return conv1d(inputs, weight, bias, groups=weight.shape[0]).transpose(1, 2)


class AbstractRunner(ABC):
    """Runs one layer's mixer with given tensors and cache."""

    #: Rotary embedding of the layer and the head size it applies to; None without positions.
    rope: tuple[Rope, int] | None = None

    @abstractmethod
    def __init__(self, mixer: Any, numerics: Numerics) -> None:
        """Keep what is needed; raise ``NotApplicableError`` for what cannot be run."""

    def at_layer(self, index: int, n_layers: int) -> "AbstractRunner":
        """What runs layer ``index`` of ``n_layers``: itself, where nothing depends on the depth."""
        return self

    @abstractmethod
    def shapes(self, d_model: int) -> Shapes:
        """Tensors by name."""

    @abstractmethod
    def run(self, x: Tensor, w: Tensors, cache: Any, table: Rotary | None, first: bool) -> Tensor:
        """Mix x [B, S, D]; ``first`` for a prompt into an empty cache, else one token."""


class RecurrentRunner(AbstractRunner):
    """A mixer with a :class:`FixedState`."""

    @abstractmethod
    def state_sizes(self) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Sizes of state and columns of one sequence."""

    def cache(self, *, batch: int, dtype: torch.dtype, device: torch.device) -> FixedState:
        """Return the empty state."""
        state, columns = self.state_sizes()
        return FixedState(state, columns, batch=batch, dtype=dtype, device=device)


def linear_scan(a: Tensor, b: Tensor, h: Tensor) -> Tensor:
    """All h_t = a_t h_{t-1} + b_t along axis 1, from h; log2(S) elementwise passes, no loop over t.

    After pass j, (a_t, b_t) composes the last 2^j steps up to t (Hillis and Steele's scan).
    """
    a, b = a.clone(), b.clone()
    b[:, 0] += a[:, 0] * h
    step, s = 1, a.shape[1]
    while step < s:
        b[:, step:] = torch.addcmul(b[:, step:], a[:, step:], b[:, :-step])
        if 2 * step < s:
            a[:, step:] = a[:, step:] * a[:, :-step]
        step *= 2
    return b


def scan_pieces(a: Tensor, b: Tensor, h: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``linear_scan`` over pieces of axis 1 whose passes stay in a core's L2 cache.

    Yields (tokens, their states); ``h`` moves on in place.
    """
    tokens = PIECE_ELEMENTS // max(1, h.numel())
    size = max(SHORTEST_PIECE, 2 ** max(0, tokens.bit_length() - 1))
    for start in range(0, a.shape[1], size):
        piece = slice(start, start + size)
        states = linear_scan(a[:, piece], b[:, piece], h)
        h.copy_(states[:, -1])
        yield piece, states
