"""Seconds of one engine iteration, from tables built once per candidate.

An iteration of continuous batching runs ``n`` decoding sequences and some tokens of prompts
together. Its time depends on that iteration's own load, never on averages:

    n >= 1, no prompt    D(n, R)
    with c prompt tokens D(n, R) + L(n + c) - L(n) + A,    D(0, 0) = head and overhead
    A = floor + sum over chunks p..p+c of max(G(p + c) - G(p), Q(p), X(p + c))

R   bytes the mixers move for the sequences in the batch, added up over what each one really holds
D   a whole decode step, from the cost model at every batch size, piecewise linear in R
L   projections, experts, norms and collectives for that many tokens (the weights are read once)
G   attention and other mixing over a prompt of that length; a chunk is a difference, so all
    chunks of a prompt sum to the whole prompt's cost
Q   reading the prefix again, which binds for small chunks behind long prefixes
X   passing K and V around the ranks of context parallelism

Ignored: that kernels of prompt and decode may overlap; what a captured graph saves in mixed steps.
"""

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from costmodel.basis import weakest
from costmodel.model import Model
from costmodel.planning.parallel import Parallel
from costmodel.planning.pricing import Estimate, Floats, StepBuilder

#: Token counts up to this have their own entry in L; above, one of ``_STRIDE`` and interpolation.
_EXACT = 1024
_STRIDE = 64
#: Most entries of the tables over prompt lengths.
_PROMPT_ENTRIES = 2048
#: Knots in R are dropped where straight lines stay this close.
_STRAIGHT = 1e-3


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StepTable:
    """Plain lists, because the simulator reads single entries millions of times.

    chunk_tokens, max_batch  limits of one iteration
    knots    bytes per sequence at which D changes slope; ``base[n][j] + slope[n][j] * R`` holds
             while ``knots[j] <= R / n < knots[j + 1]``
    alone_s  an iteration without decoding sequences, before its tokens are priced
    basis    the weakest source of the times
    host_s   the host cannot start the kernels of a mixed iteration faster than this
    exchange_s   K and V of a prompt of that length past all context-parallel ranks; empty without
    """

    chunk_tokens: int
    max_batch: int
    knots: list[float]
    base: list[list[float]]
    slope: list[list[float]]
    exact_s: list[float]
    coarse_s: list[float]
    prompt_s: list[float]
    prefix_s: list[float]
    prompt_shift: int
    floor_s: float
    alone_s: float
    host_s: float
    basis: str = "prior"
    exchange_s: list[float] = field(default_factory=list)

    def decode_s(self, n: int, moved: float) -> float:
        """D(n, R), n >= 1."""
        j = bisect_right(self.knots, moved / n) - 1
        j = 0 if j < 0 else j
        return self.base[n][j] + self.slope[n][j] * moved

    def token_s(self, tokens: int) -> float:
        """L of so many tokens."""
        if tokens <= _EXACT:
            return self.exact_s[tokens]
        k, rest = divmod(tokens - _EXACT, _STRIDE)
        low = self.coarse_s[k]
        return low + (self.coarse_s[k + 1] - low) * rest / _STRIDE

    def chunk_s(self, start: int, tokens: int) -> float:
        """One chunk's part of A, without the floor."""
        mixing = _at(self.prompt_s, self.prompt_shift, start + tokens) - _at(
            self.prompt_s, self.prompt_shift, start
        )
        if self.exchange_s:
            passed = _at(self.exchange_s, self.prompt_shift, start + tokens)
            mixing = mixing if mixing > passed else passed
        if start == 0:
            return mixing
        again = _at(self.prefix_s, self.prompt_shift, start)
        return mixing if mixing > again else again

    def mixed_s(self, n: int, moved: float, tokens: int, chunks_s: float) -> float:
        """An iteration with ``tokens`` prompt tokens whose chunks take ``chunks_s`` of mixing."""
        extra = self.floor_s + chunks_s
        if n:
            time = self.decode_s(n, moved) + self.token_s(n + tokens) - self.token_s(n) + extra
        else:
            time = self.alone_s + self.token_s(tokens) + extra
        return time if time > self.host_s else self.host_s

    def mixing_s(self, tokens: Floats, cached: Floats) -> Floats:
        """Seconds of mixing over whole prompts, floors left out."""
        grid = np.arange(len(self.prompt_s)) * float(1 << self.prompt_shift)
        done: Floats = np.interp(cached, grid, self.prompt_s)
        return np.interp(tokens, grid, self.prompt_s) - done

    def piggyback_s(self, n: int, tokens: float) -> float:
        """Least that ``tokens`` prompt tokens an iteration, on average, add to iterations of ``n``
        decoding sequences. L is convex, so equal shares are cheapest; above a full chunk the rest
        costs what a full one does. The floor is paid at least once per full chunk.
        """
        room = self.chunk_tokens - n
        if room <= 0:
            full_s = self.token_s(self.chunk_tokens) + self.floor_s
            return tokens * full_s / self.chunk_tokens
        floors_s = self.floor_s * tokens / room
        if tokens <= room:
            low = int(tokens)
            share = tokens - low
            ends = [self.token_s(n + k) for k in (low, min(low + 1, room))]
            return ends[0] + (ends[1] - ends[0]) * share - self.token_s(n) + floors_s
        return tokens * (self.token_s(self.chunk_tokens) - self.token_s(n)) / room + floors_s


def _at(table: list[float], shift: int, tokens: int) -> float:
    k = tokens >> shift
    low = table[k]
    return low + (table[k + 1] - low) * ((tokens & ((1 << shift) - 1)) / (1 << shift))


def build_steps(
    model: Model,
    *,
    chunk_tokens: int,
    max_batch: int,
    max_tokens: int,
    max_output: int,
    parallel: Parallel | None = None,
    estimate: Estimate = "mid",
) -> StepTable:
    """Tables of one candidate. ``max_tokens``: longest prompt and output together."""
    parallel = parallel or Parallel()
    make = StepBuilder(model, parallel, estimate)
    moved, decode_s = make.decode(max_batch, max_tokens, max_output)
    kept = _straightened(moved, decode_s)
    moved, decode_s = moved[kept], decode_s[:, kept]
    knots, base, slope = _lines(moved, decode_s)
    largest = chunk_tokens + max_batch
    exact = make.tokens(np.arange(1.0, _EXACT + 1))
    n_coarse = max(0, largest - _EXACT) // _STRIDE + 3
    coarse = make.tokens(_EXACT + _STRIDE * np.arange(float(n_coarse)))
    shift = max(6, int(np.ceil(np.log2(max(2.0, max_tokens / _PROMPT_ENTRIES)))))
    n_prompts = (max_tokens >> shift) + 3
    lengths = np.maximum(1.0, np.arange(float(n_prompts)) * (1 << shift))
    prompt_s, prefix_s, floor = make.prompts(lengths)
    table = StepTable(
        chunk_tokens=chunk_tokens,
        max_batch=max_batch,
        knots=knots.tolist(),
        base=[[], *base.tolist()],
        slope=[[], *slope.tolist()],
        exact_s=[0.0, *exact.tolist()],
        coarse_s=coarse.tolist(),
        prompt_s=prompt_s.tolist(),
        prefix_s=prefix_s.tolist(),
        prompt_shift=shift,
        floor_s=floor,
        alone_s=make.alone_s(),
        host_s=make.host_s(),
        basis=weakest(make.bases),
    )
    return parallel.applied(table, model)


def _straightened(x: Floats, y: Floats) -> NDArray[np.intp]:
    """Indices of knots to keep so that straight lines between them stay within ``_STRAIGHT``."""
    kept = [0]
    while kept[-1] < x.size - 1:
        start = kept[-1]
        end = start + 1
        while end + 1 < x.size and _is_straight(x, y, start, end + 1):
            end += 1
        kept.append(end)
    return np.array(kept, dtype=np.intp)


def _is_straight(x: Floats, y: Floats, start: int, end: int) -> bool:
    share = (x[start + 1 : end] - x[start]) / (x[end] - x[start])
    line = y[:, start, None] * (1 - share) + y[:, end, None] * share
    return bool(np.all(np.abs(line - y[:, start + 1 : end]) <= _STRAIGHT * y[:, start + 1 : end]))


def _lines(moved: Floats, decode_s: Floats) -> tuple[Floats, Floats, Floats]:
    """Knots per sequence, and D as base + slope R between them, by batch."""
    batch = np.arange(1.0, decode_s.shape[0] + 1)[:, None]
    if moved.size == 1:
        return moved, decode_s, np.zeros_like(decode_s)
    slope = np.diff(decode_s, axis=1) / (np.diff(moved) * batch)
    base = decode_s[:, :-1] - slope * (moved[:-1] * batch)
    return moved[:-1], base, slope
