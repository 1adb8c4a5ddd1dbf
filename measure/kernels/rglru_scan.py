"""RG-LRU's prompt: gates, decay and the linear recurrence in one pass over the channels.

    r, i = sigmoid(recurrence gate), sigmoid(input gate)
    a_t = exp(-8 r_t softplus(lambda)),  h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t x_t

and the first token of a text enters unscaled. Segments of the prompt run side by side: the first
pass leaves each one's product of decays and what it ends in from an empty state; the second enters
every segment with the state the ones before it lead to. One segment needs the second pass only.

Bytes per channel and token in 16 bits: x and both gates read, states written: 8 in one pass, 14 in
two (the torch form makes about 100: some 30 elementwise passes, log2 S of them the scan). Ceiling:
memory bandwidth; six transcendentals a channel and token (two sigmoids of two, exp and sqrt; 16 a
clock and multiprocessor on an H200: 3.7e12/s) allow 4.9 TB/s, as much again, so the passes are
balanced and want many programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import softplus

from measure.kernels._compile import HOPPER, CompileCase, typed
from measure.kernels._splits import sm_count

#: Channels of one program, and tokens scanned at once.
_CHANNELS, _TOKENS = 64, 32
_PROGRAMS_PER_SM = 8
#: The constant c of arXiv 2402.19427.
_DECAY_SCALE = 8.0


@triton.jit
def compose(a1, b1, a2, b2):
    """Two steps h -> a h + b as one."""
    return a1 * a2, b1 * a2 + b2


@triton.jit
def decays_and_inputs(
    x, recurrence, entry, rate, start, token, channel, n_tokens, n_channels, first,
):  # fmt: skip
    """Coefficients [TOKENS, CHANNELS] of h = a h + b; (1, 0) behind the end."""
    there = (token < n_tokens)[:, None] & (channel < n_channels)[None, :]
    at = (start + token)[:, None] * n_channels + channel[None, :]
    r = tl.sigmoid(tl.load(recurrence + at, mask=there, other=0.0).to(tl.float32))
    i = tl.sigmoid(tl.load(entry + at, mask=there, other=0.0).to(tl.float32))
    value = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    log_a = -r * rate[None, :]
    # 1 - a^2 = -expm1(2 log a), of which small arguments want the series
    double = 2.0 * log_a
    series = -double * (1.0 + double * (0.5 + double * (0.16666667 + double * 0.041666668)))
    a = tl.exp(log_a)
    room = tl.where(double > -0.1, series, 1.0 - a * a)
    scale = tl.where((token == 0)[:, None] & (first != 0), 1.0, tl.sqrt(room))
    return tl.where(there, a, 1.0), tl.where(there, scale * value * i, 0.0)


@triton.jit
def segments_kernel(
    x, recurrence, entry, rates, products, ends, n_tokens, n_channels, segment_tokens, first,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A segment's product of decays, and its end from an empty state; grid as below."""
    batch, segment = tl.program_id(2).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < n_channels
    rate = tl.load(rates + channel, mask=inside, other=0.0)
    product = tl.full((CHANNELS,), 1.0, tl.float32)
    end = tl.zeros((CHANNELS,), tl.float32)
    begin = segment * segment_tokens
    stop = tl.minimum(begin + segment_tokens, n_tokens)
    for tile in range(begin, stop, TOKENS):
        token = tile + tl.arange(0, TOKENS)
        a, b = decays_and_inputs(
            x, recurrence, entry, rate, batch * n_tokens, token, channel, n_tokens, n_channels,
            first,
        )  # fmt: skip
        # a scan, for a reduction combines rows in whatever order lanes hold them
        b += tl.where((token == tile)[:, None], a * end[None, :], 0.0)
        a, h = tl.associative_scan((a, b), 0, compose)
        last = (token == tile + TOKENS - 1)[:, None]
        product *= tl.sum(tl.where(last, a, 0.0), 0)
        end = tl.sum(tl.where(last, h, 0.0), 0)
    at = (batch * tl.num_programs(1) + segment) * n_channels + channel
    tl.store(products + at, product, mask=inside)
    tl.store(ends + at, end, mask=inside)


@triton.jit
def scan_kernel(
    x, recurrence, entry, rates, products, ends, state, new_state, out, n_tokens, n_channels,
    segment_tokens, first, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """States of all tokens of a segment; grid (channels, segments, B)."""
    batch, segment = tl.program_id(2).to(tl.int64), tl.program_id(1)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < n_channels
    rate = tl.load(rates + channel, mask=inside, other=0.0)
    held = tl.load(state + batch * n_channels + channel, mask=inside, other=0.0)
    for before in range(0, segment):
        at = (batch * tl.num_programs(1) + before) * n_channels + channel
        held = held * tl.load(products + at, mask=inside, other=1.0)
        held += tl.load(ends + at, mask=inside, other=0.0)
    begin = segment * segment_tokens
    stop = tl.minimum(begin + segment_tokens, n_tokens)
    for tile in range(begin, stop, TOKENS):
        token = tile + tl.arange(0, TOKENS)
        a, b = decays_and_inputs(
            x, recurrence, entry, rate, batch * n_tokens, token, channel, n_tokens, n_channels,
            first,
        )  # fmt: skip
        # the state enters through the tile's first token
        b += tl.where((token == tile)[:, None], a * held[None, :], 0.0)
        _, h = tl.associative_scan((a, b), 0, compose)
        at = (batch * n_tokens + token)[:, None] * n_channels + channel[None, :]
        there = (token < n_tokens)[:, None] & inside[None, :]
        tl.store(out + at, h.to(out.dtype.element_ty), mask=there)
        # behind the end a = 1, b = 0: the last row holds the state whatever the length
        held = tl.sum(tl.where((token == tile + TOKENS - 1)[:, None], h, 0.0), 0)
    if stop == n_tokens:
        tl.store(new_state + batch * n_channels + channel, held, mask=inside)


def rglru_scan(
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    decay: Tensor,
    state: Tensor,
    *,
    first: bool,
    segments: int | None = None,
) -> Tensor:
    """States of all tokens of a prompt; ``state`` becomes the last one, in place.

    Parameters
    ----------
    x, recurrence_gate, input_gate
        [B, S, W]: what enters, and the gates before their sigmoids.
    decay
        lambda [W].
    state
        fp32 [B, W] before the prompt.
    first
        Whether the first token is the text's first, which is not scaled.
    segments
        Pieces of the prompt that run side by side; default: enough to fill the device.

    Returns
    -------
    Tensor
        [B, S, W] in x's dtype.
    """
    batch, n_tokens, n_channels = x.shape
    x, recurrence_gate, input_gate = (y.contiguous() for y in (x, recurrence_gate, input_gate))
    rates = _DECAY_SCALE * softplus(decay.float())
    columns = -(-n_channels // _CHANNELS)
    if segments is None:
        wanted = sm_count(x.device) * _PROGRAMS_PER_SM // (columns * batch)
        segments = max(1, min(wanted, n_tokens // (8 * _TOKENS)))
    segment_tokens = -(-n_tokens // (segments * _TOKENS)) * _TOKENS
    segments = -(-n_tokens // segment_tokens)
    products, ends = (torch.empty(batch, segments, n_channels, device=x.device) for _ in range(2))
    out, new_state = torch.empty_like(x), torch.empty_like(state)
    inputs = (x, recurrence_gate, input_gate, rates, products, ends)
    sizes = (n_tokens, n_channels, segment_tokens, int(first))
    grid, tile = (columns, segments, batch), {"TOKENS": _TOKENS, "CHANNELS": _CHANNELS}
    if segments > 1:
        segments_kernel[grid](*inputs, *sizes, **tile, num_warps=4)
    scan_kernel[grid](*inputs, state, new_state, out, *sizes, **tile, num_warps=4)
    state.copy_(new_state)
    return out


def rglru_scan_reference(
    x: Tensor,
    recurrence_gate: Tensor,
    input_gate: Tensor,
    decay: Tensor,
    state: Tensor,
    *,
    first: bool,
) -> Tensor:
    """The same token by token, in fp32."""
    out, h = torch.empty_like(x), state.clone()
    for t in range(x.shape[1]):
        log_a = -_DECAY_SCALE * recurrence_gate[:, t].float().sigmoid() * softplus(decay.float())
        scale = 1.0 if first and t == 0 else torch.sqrt(-torch.expm1(2 * log_a))
        h = log_a.exp() * h + scale * input_gate[:, t].float().sigmoid() * x[:, t].float()
        out[:, t] = h
    state.copy_(h)
    return out


_SIZES = "n_tokens n_channels segment_tokens first"
_TILE = {"TOKENS": _TOKENS, "CHANNELS": _CHANNELS}
COMPILE_CASES = (
    CompileCase(
        name="segments, bf16",
        kernel=segments_kernel,
        signature=typed(
            {"*bf16": "x recurrence entry", "*fp32": "rates products ends", "i32": _SIZES}
        ),
        constants=_TILE,
        aligned=("n_channels", "segment_tokens"),
        architectures=HOPPER,
    ),
    CompileCase(
        name="scan, bf16",
        kernel=scan_kernel,
        signature=typed(
            {
                "*bf16": "x recurrence entry out",
                "*fp32": "rates products ends state new_state",
                "i32": _SIZES,
            }
        ),
        constants=_TILE,
        aligned=("n_channels", "segment_tokens"),
    ),
)
