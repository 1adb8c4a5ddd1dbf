"""Mamba-2's prompt (state space duality): chunks are matmuls, states pass from chunk to chunk.

Per head, with l the running sum of log decays within a chunk of c tokens (arXiv 2405.21060):

    1. what a chunk adds        A_n = sum_t exp(l_c - l_t) x_t b_t^T            [P, N]
    2. states between chunks    h_{n+1} = exp(l_c) h_n + A_n, one chunk after another
    3. outputs                  y_t = exp(l_t) h_n c_t + sum_{s <= t} exp(l_t - l_s) (c_t b_s) x_s

Bytes per head and token, x and y in fp32 as the mixer hands them over, b and c in the model's 16
bits (P = 64, N = 128, H / G heads share b, c): x read twice and y written 3 * 4 P = 768; b read
twice, c once, by each head from L2: from memory 3 * 2 N G / H; states [P, N] of a chunk written,
read and rewritten, read: 16 P N / c = 512 at c = 256. FLOPs per token and head: 2 P N (states) +
2 P N (read out) + (N + P) c (scores, half of them masked) = 82k at c = 256: 1.3 kB and 82 kFLOP, 63
FLOP a byte. Ceiling: tf32 matrix units (495 TFLOP/s dense on an H200 against 4.8 TB/s * 63 = 300)
only just lie above memory bandwidth, so memory bandwidth, as long as one product of tf32 is enough.
Of fp32 models it is not: three such products stand for one, 165 TFLOP/s, and they bind.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from measure.kernels import interpreted
from measure.kernels._compile import ARCHITECTURES, HOPPER, CompileCase, typed

#: Tokens of a tile within a chunk, and state columns of one program.
_TOKENS, _COLUMNS = 64, 64
#: Tiles in flight where outputs are made: a third would leave one block per multiprocessor, and of
#: larger states than this a second would not fit an A100's.
_STAGES, _STAGED_STATE = 2, 8192


@triton.jit
def chunk_totals_kernel(decays, totals, n_tokens, heads, CHUNK: tl.constexpr):
    """Running sums of the log decays [B, S, H] within chunks -> [B, H, S']; grid (chunks, B H)."""
    chunk, unit = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    at = (unit // heads * n_tokens + token) * heads + unit % heads
    decay = tl.load(decays + at, mask=token < n_tokens, other=0.0)
    room = tl.num_programs(0) * CHUNK
    tl.store(totals + unit * room + token, tl.cumsum(decay, 0))


@triton.jit
def chunk_states_kernel(
    x, b, totals, states, n_tokens, heads, groups,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds to the state [P, N]; grid (chunks, B H, N / COLUMNS)."""
    chunk, unit = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    batch, head = unit // heads, unit % heads
    group = head // (heads // groups)
    chunks = tl.num_programs(0)
    rows, columns = tl.arange(0, P), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    totals += (unit * chunks + chunk) * CHUNK
    last = tl.load(totals + CHUNK - 1)
    added = tl.zeros((P, COLUMNS), tl.float32)
    for start in range(0, CHUNK, TOKENS):
        inner = start + tl.arange(0, TOKENS)
        token = chunk * CHUNK + inner
        there = token < n_tokens
        left = tl.exp(last - tl.load(totals + inner))
        at = (batch * n_tokens + token) * heads + head
        values = tl.load(x + at[None, :] * P + rows[:, None], mask=there[None, :], other=0.0).to(
            tl.float32
        )
        at = (batch * n_tokens + token) * groups + group
        inputs = tl.load(b + at[:, None] * N + columns[None, :], mask=there[:, None], other=0.0).to(
            tl.float32
        )
        added = tl.dot(values * left[None, :], inputs, added, input_precision=PRECISION)
    at = ((unit * chunks + chunk) * P + rows[:, None]) * N + columns[None, :]
    tl.store(states + at, added)


@triton.jit
def pass_states_kernel(
    totals, states, state, chunks, CHUNK: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """``states`` become those before each chunk, ``state`` the last; grid (SIZE / BLOCK, B H)."""
    unit = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = tl.load(state + unit * SIZE + element)
    for chunk in range(0, chunks):
        at = states + (unit * chunks + chunk) * SIZE + element
        added = tl.load(at)
        tl.store(at, held)
        kept = tl.exp(tl.load(totals + (unit * chunks + chunk + 1) * CHUNK - 1))
        held = held * kept + added
    tl.store(state + unit * SIZE + element, held)


@triton.jit
def chunk_outputs_kernel(
    x, b, c, totals, states, y, n_tokens, heads, groups,
    CHUNK: tl.constexpr, TOKENS: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Outputs of a tile of tokens; grid (tiles of a chunk, chunks, B H).

    b and c are multiplied as they are stored, which is exact, unless they shall be widened.
    """
    tile, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    unit = tl.program_id(2).to(tl.int64)
    batch, head = unit // heads, unit % heads
    group = head // (heads // groups)
    chunks = tl.num_programs(1)
    rows, columns = tl.arange(0, P), tl.arange(0, N)
    totals += (unit * chunks + chunk) * CHUNK
    inner = tile * TOKENS + tl.arange(0, TOKENS)
    token = chunk * CHUNK + inner
    there = token < n_tokens
    total = tl.load(totals + inner)
    at = (batch * n_tokens + token) * groups + group
    reads = tl.load(c + at[:, None] * N + columns[None, :], mask=there[:, None], other=0.0)
    at = ((unit * chunks + chunk) * P + rows[None, :]) * N + columns[:, None]
    out = tl.dot(reads.to(tl.float32), tl.load(states + at), input_precision=PRECISION)
    if WIDEN:
        reads = reads.to(tl.float32)
    out = out * tl.exp(total)[:, None]
    for start in range(0, (tile + 1) * TOKENS, TOKENS):
        source = start + tl.arange(0, TOKENS)
        from_token = chunk * CHUNK + source
        given = from_token < n_tokens
        row = (batch * n_tokens + from_token) * groups + group
        inputs = tl.load(b + row[None, :] * N + columns[:, None], mask=given[None, :], other=0.0)
        if WIDEN:
            inputs = inputs.to(tl.float32)
        scores = tl.dot(reads, inputs, input_precision=PRECISION)
        between = total[:, None] - tl.load(totals + source)[None, :]
        past = source[None, :] <= inner[:, None]
        scores = tl.where(past, scores * tl.exp(tl.where(past, between, 0.0)), 0.0)
        source_row = (batch * n_tokens + from_token) * heads + head
        values = tl.load(
            x + source_row[:, None] * P + rows[None, :], mask=given[:, None], other=0.0
        ).to(tl.float32)
        out = tl.dot(scores, values, out, input_precision=PRECISION)
    at = (batch * n_tokens + token) * heads + head
    tl.store(y + at[:, None] * P + rows[None, :], out.to(y.dtype.element_ty), mask=there[:, None])


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _stages(p: int, n: int) -> int:
    return _STAGES if p * n <= _STAGED_STATE else 1


def ssd_scan(
    x: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, state: Tensor, chunk_tokens: int
) -> Tensor:
    """All outputs of a prompt; ``state`` goes from before it to after it, in place.

    Parameters
    ----------
    x
        Inputs times step size [B, S, H, P]; P and N are powers of two from 16 on, P N at most
        2^15: a block holds a head's state.
    b, c
        [B, S, G, N], G dividing H. Their type decides what products are made in: tf32, which is
        finer than 16 bits; for fp32 three products of tf32, as exact as fp32 to some 2^-21.
    log_decay
        fp32 [B, S, H], at most 0.
    state
        fp32 [B, H, P, N].
    chunk_tokens
        c above, a power of two from 16 on. The result does not depend on it.

    Returns
    -------
    Tensor
        [B, S, H, P] in x's dtype.
    """
    batch, n_tokens, heads, p = x.shape
    groups, n = b.shape[2:]
    x, b, c, log_decay = (t.contiguous() for t in (x, b, c, log_decay))
    chunks, units = -(-n_tokens // chunk_tokens), batch * heads
    tokens, columns = min(_TOKENS, chunk_tokens), min(_COLUMNS, n)
    totals = torch.empty(units, chunks * chunk_tokens, device=x.device)
    states = torch.empty(units, chunks, p, n, device=x.device)
    y = torch.empty_like(x)
    shape = {"CHUNK": chunk_tokens, "TOKENS": tokens, "P": p, "N": n,
             "PRECISION": _precision(b.dtype)}  # fmt: skip
    chunk_totals_kernel[(chunks, units)](
        log_decay, totals, n_tokens, heads, CHUNK=chunk_tokens, num_warps=1
    )
    chunk_states_kernel[(chunks, units, n // columns)](
        x, b, totals, states, n_tokens, heads, groups, COLUMNS=columns, num_warps=4, **shape
    )
    block = min(1024, p * n)
    pass_states_kernel[(p * n // block, units)](
        totals, states, state, chunks, CHUNK=chunk_tokens, SIZE=p * n, BLOCK=block, num_warps=4
    )
    chunk_outputs_kernel[(chunk_tokens // tokens, chunks, units)](
        x, b, c, totals, states, y, n_tokens, heads, groups, num_stages=_stages(p, n),
        WIDEN=interpreted(), num_warps=4, **shape,
    )  # fmt: skip
    return y


def ssd_scan_reference(x: Tensor, b: Tensor, c: Tensor, log_decay: Tensor, state: Tensor) -> Tensor:
    """The recurrence itself, token by token; ``state`` in place as above."""
    out = torch.empty_like(x)
    per_group = x.shape[2] // b.shape[2]
    for t in range(x.shape[1]):
        bt, ct = (y[:, t].float().repeat_interleave(per_group, 1) for y in (b, c))
        state.mul_(log_decay[:, t].exp()[..., None, None])
        state.add_(x[:, t].float().unsqueeze(-1) * bt.unsqueeze(-2))
        out[:, t] = (state @ ct.unsqueeze(-1)).squeeze(-1)
    return out


def _cases(p: int, n: int, dtype: torch.dtype, *, tested: bool = True) -> tuple[CompileCase, ...]:
    stored = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    shape = {"CHUNK": 256, "TOKENS": _TOKENS, "P": p, "N": n, "PRECISION": _precision(dtype)}
    sizes, bc = "n_tokens heads groups", {"b": stored, "c": stored}
    return (
        CompileCase(
            name=f"chunk states, {stored[1:]}, P {p}, N {n}",
            kernel=chunk_states_kernel,
            signature=typed({"*fp32": "x totals states", "i32": sizes}) | {"b": stored},
            constants={**shape, "COLUMNS": min(_COLUMNS, n)},
            architectures=HOPPER,
            tested=tested,
        ),
        CompileCase(
            name=f"chunk outputs, {stored[1:]}, P {p}, N {n}",
            kernel=chunk_outputs_kernel,
            signature=typed({"*fp32": "x totals states y", "i32": sizes}) | bc,
            constants={**shape, "WIDEN": False},
            num_stages=_stages(p, n),
            max_loop_spills=0 if tested else 220,
            architectures=ARCHITECTURES if tested else HOPPER,
            tested=tested,
        ),
    )


COMPILE_CASES = (
    CompileCase(
        name="running sums of log decays",
        kernel=chunk_totals_kernel,
        signature=typed({"*fp32": "decays totals", "i32": "n_tokens heads"}),
        constants={"CHUNK": 256},
        num_warps=1,
        architectures=HOPPER,
    ),
    CompileCase(
        name="states between chunks",
        kernel=pass_states_kernel,
        signature=typed({"*fp32": "totals states state", "i32": "chunks"}),
        constants={"CHUNK": 256, "SIZE": 8192, "BLOCK": 1024},
        architectures=HOPPER,
    ),
    *_cases(64, 128, torch.bfloat16),
    *_cases(64, 128, torch.float32, tested=False),
    *_cases(128, 256, torch.bfloat16, tested=False),
)
