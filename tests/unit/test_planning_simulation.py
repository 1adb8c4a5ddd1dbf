"""The event-driven simulator against a loop over every iteration, and against hand-worked cases."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.planning.fleet import simulate
from costmodel.planning.load import Load
from costmodel.planning.steps import StepTable


def table(
    *,
    chunk: int = 64,
    max_batch: int = 8,
    weights: float = 1e-3,
    per_byte: float = 1e-6,
    per_token: float = 1e-4,
    pair: float = 0.0,
    knot: float | None = None,
) -> StepTable:
    """A transparent engine: D = weights + n per_token + per_byte R, L = weights + per_token M.

    ``knot``: bytes per sequence above which a byte costs twice as much.
    """
    base, slope = [[]], [[]]
    for n in range(1, max_batch + 1):
        fixed = weights + n * per_token
        if knot is None:
            base.append([fixed])
            slope.append([per_byte])
        else:
            base.append([fixed, fixed - per_byte * knot * n])
            slope.append([per_byte, 2 * per_byte])
    tokens = np.arange(1025.0)
    coarse = 1024 + 64 * np.arange(40.0)
    lengths = np.arange(40.0) * 64
    return StepTable(
        chunk_tokens=chunk,
        max_batch=max_batch,
        knots=[0.0] if knot is None else [0.0, knot],
        base=base,
        slope=slope,
        exact_s=[0.0, *(weights + per_token * tokens[1:]).tolist()],
        coarse_s=(weights + per_token * coarse).tolist(),
        prompt_s=(pair * lengths**2).tolist(),
        prefix_s=[0.0] * 40,
        prompt_shift=6,
        floor_s=0.0,
        alone_s=0.0,
        host_s=0.0,
    )


def load(arrival: list[float], prompt: list[int], output: list[int], **changes: float) -> Load:
    """One byte of state and one byte moved per token, unless told otherwise."""
    p = np.array(prompt, dtype=float)
    ones = np.ones(p.size)
    return Load(
        arrival_s=np.array(arrival, dtype=float),
        input_tokens=p,
        prompt_tokens=p,
        cached_tokens=0 * p,
        output_tokens=np.array(output, dtype=float),
        before_s=0 * p,
        held_bytes=p.copy(),
        held_slope=ones * changes.get("held_slope", 1.0),
        moved_bytes=p.copy(),
        moved_slope=ones * changes.get("moved_slope", 1.0),
    )


class Loop:
    """The same engine, one iteration after another and one sequence after another."""

    def __init__(self, work: Load, steps: StepTable, pool: float) -> None:
        self.work, self.steps, self.pool = work, steps, pool
        n = work.size
        self.first, self.finish = [math.inf] * n, [math.inf] * n
        self.generated = [0] * n
        self.last: dict[int, float] = {}
        self.gaps: list[float] = []
        self.waiting: list[int] = []
        self.running: list[int] = []  # decoding, in order of admission
        self.partial: tuple[int, int] | None = None
        self.now, self.coming, self.preempted = 0.0, 0, 0

    def run(self) -> "Loop":
        work = self.work
        while self.coming < work.size or self.waiting or self.running or self.partial:
            if not (self.waiting or self.running or self.partial):
                self.now = max(self.now, work.arrival_s[self.coming])
            while self.coming < work.size and work.arrival_s[self.coming] <= self.now:
                self.waiting.append(self.coming)
                self.coming += 1
            self.iterate(self.make_room())
        return self

    def after(self, i: int) -> float:
        """State once this iteration has added its token."""
        return float(self.work.held_bytes[i] + self.work.held_slope[i] * self.generated[i])

    def reserved(self) -> float:
        return sum(map(self.after, self.running)) + (
            self.after(self.partial[0]) if self.partial else 0.0
        )

    def make_room(self) -> bool:
        crowded = False
        while self.reserved() > self.pool:
            crowded = True
            self.preempted += 1
            # The prompt in work, if any, was admitted last.
            if self.partial:
                self.waiting.insert(0, self.partial[0])
                self.partial = None
            else:
                self.waiting.insert(0, self.running.pop())
        return crowded

    def prompts(self, crowded: bool) -> tuple[int, float, list[int]]:
        """(tokens, seconds of mixing, prompts that are done with this iteration)."""
        budget = self.steps.chunk_tokens - len(self.running)
        reserved, tokens, mixing, ready = self.reserved(), 0, 0.0, []
        while budget > 0:
            if self.partial is None:
                full = len(self.running) + len(ready) >= self.steps.max_batch
                if crowded or not self.waiting or full:
                    break
                i = self.waiting[0]
                if reserved + self.after(i) + self.work.held_slope[i] > self.pool:
                    break
                reserved += self.after(self.waiting.pop(0))
                mixing += float(self.work.before_s[i])
                self.partial = (i, int(self.work.cached_tokens[i]))
            i, done = self.partial
            target = int(self.work.prompt_tokens[i]) + self.generated[i]
            c = min(budget, target - done)
            mixing += self.steps.chunk_s(done, c)
            tokens, budget = tokens + c, budget - c
            self.partial = (i, done + c)
            if done + c == target:
                ready.append(i)
                self.partial = None
        return tokens, mixing, ready

    def iterate(self, crowded: bool) -> None:
        work, running = self.work, self.running
        tokens, mixing, ready = self.prompts(crowded)
        moved = sum(
            work.moved_bytes[i] + work.moved_slope[i] * (self.generated[i] - 1) for i in running
        )
        if tokens:
            self.now += self.steps.mixed_s(len(running), moved, tokens, mixing)
        else:
            self.now += self.steps.decode_s(len(running), moved)
        for i in [*running, *ready]:
            self.generated[i] += 1
            if i in self.last:
                self.gaps.append(self.now - self.last[i])
            else:
                self.first[i] = self.now
            self.last[i] = self.now
        for i in [*running, *ready]:
            if self.generated[i] == work.output_tokens[i]:
                self.finish[i] = self.now
        self.running = [i for i in [*running, *ready] if self.finish[i] == math.inf]


CASES = [
    {},
    {"pool": 700.0},
    {"pool": 520.0, "max_batch": 3},
    {"knot": 90.0},
    {"pair": 1e-7, "chunk": 16},
    {"chunk": 500, "pool": 900.0, "knot": 150.0, "pair": 1e-7},
]


def agree(work: Load, steps: StepTable, pool: float) -> int:
    """Assert that both give every request the same times and every token the same gap; returns how
    many were preempted.
    """
    loop = Loop(work, steps, pool).run()
    found = simulate(work, steps, pool, 1)
    np.testing.assert_allclose(found.first_s, loop.first, rtol=1e-9)
    np.testing.assert_allclose(found.finish_s, loop.finish, rtol=1e-9)
    _, first_gap, growth, m, sequences = found.gaps
    each = [
        gap
        for a, b, count, k in zip(first_gap, growth, m, sequences, strict=True)
        for gap in np.repeat(a + b * np.arange(count), k)
    ]
    np.testing.assert_allclose(sorted([*each, *found.stalls[1]]), sorted(loop.gaps), rtol=1e-8)
    assert found.n_preempted == loop.preempted
    return loop.preempted


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_events_equal_the_loop_over_iterations(case: dict[str, float], seed: int) -> None:
    options = dict(case)
    pool = options.pop("pool", 1e9)
    rng = np.random.default_rng(seed)
    n = 60
    arrival = np.cumsum(rng.exponential(0.02, n))
    work = load(
        arrival - arrival[0], rng.integers(1, 300, n).tolist(), rng.integers(1, 120, n).tolist()
    )
    agree(work, table(**options), pool)  # type: ignore[arg-type]


@st.composite
def loads(draw: st.DrawFn) -> tuple[Load, float]:
    """Requests of every kind together, and a pool that the largest of them just fits or not: state
    that grows with every token, windows that are full (no growth), fixed state (no growth, the
    same for all prompts), found prefixes, a compressor's own pass; bursts and quiet.
    """
    n = draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    gaps = rng.exponential(draw(st.sampled_from((1e-4, 0.01, 0.5))), n)
    arrival = np.cumsum(np.where(rng.random(n) < 0.3, 0.0, gaps))
    prompt = rng.integers(1, draw(st.sampled_from((20, 400))), n).astype(float)
    output = rng.integers(1, draw(st.sampled_from((3, 90))), n).astype(float)
    kinds = rng.integers(0, 3, n)
    only = draw(st.sampled_from((None, 0, 1, 2)))
    kinds = kinds if only is None else np.full(n, only)
    held = np.choose(kinds, [prompt, np.minimum(prompt, 64.0), np.full(n, 30.0)])
    slope = np.where(kinds == 0, 1.0, 0.0)
    share = draw(st.sampled_from((0.0, 0.5, 0.95)))
    work = Load(
        arrival_s=arrival - arrival[0], input_tokens=prompt, prompt_tokens=prompt,
        cached_tokens=np.minimum(np.floor(share * prompt), prompt - 1), output_tokens=output,
        before_s=np.full(n, draw(st.sampled_from((0.0, 2e-3)))), held_bytes=held,
        held_slope=slope, moved_bytes=held, moved_slope=slope,
    )  # fmt: skip
    return work, float(work.peak_bytes.max()) * draw(st.sampled_from((1.0, 1.3, 4.0, 1e6)))


@settings(max_examples=150, deadline=None)
@given(
    drawn=loads(),
    chunk=st.sampled_from((9, 33, 512)),
    max_batch=st.integers(1, 8),
    knot=st.sampled_from((None, 60.0, 150.0)),
    pair=st.sampled_from((0.0, 1e-7)),
)
def test_events_equal_the_loop_for_any_load(
    drawn: tuple[Load, float], chunk: int, max_batch: int, knot: float | None, pair: float
) -> None:
    work, pool = drawn
    agree(work, table(chunk=chunk, max_batch=max_batch, knot=knot, pair=pair), pool)


def test_one_request_by_hand() -> None:
    # 100 prompt tokens in chunks of 64: L(64) + L(36) = 2 * 1 ms + 100 * 0.1 ms = 12 ms.
    # Four decode iterations read 100, 101, 102, 103 bytes: 4 * 1.1 ms + 406 us = 4.806 ms.
    found = simulate(load([0.0], [100], [5]), table(), 1e9, 1)
    assert found.first_s[0] == pytest.approx(12e-3)
    assert found.finish_s[0] == pytest.approx(12e-3 + 4.806e-3)


def test_a_long_request_among_short_ones_is_not_averaged() -> None:
    """Iterations that carry the 2,000-token sequence read its 2,000 bytes; all others do not."""
    steps = table(chunk=2400, max_batch=4, per_byte=1e-5)
    work = load([0.0, 0.0, 5.0, 5.0], [2000, 10, 10, 10], [3, 3, 3, 3])
    found = simulate(work, steps, 1e9, 1)
    # Together: 1.2 ms + 10 us * (2,000 + 10) and (2,001 + 11): 21.3 and 21.32 ms.
    both = found.finish_s[0] - found.first_s[0]
    assert both == pytest.approx(2 * 1.2e-3 + 1e-5 * (2010 + 2012))
    # The two short ones: 1.2 ms + 10 us * 20 and 22.
    assert found.finish_s[2] - found.first_s[2] == pytest.approx(2 * 1.2e-3 + 1e-5 * 42)
    # With the mean of 507.5 bytes a sequence, they would take 22.75 ms instead of 2.82.
    assert found.finish_s[2] - found.first_s[2] < 3e-3


def test_the_last_admitted_is_preempted_and_recomputed() -> None:
    # Two requests of 10 + 20 tokens and room for 40: both are admitted with 10, grow by 1 each, and
    # the one that came last gives way; it has to finish after the first.
    steps = table(chunk=64)
    found = simulate(load([0.0, 0.0], [10, 10], [20, 20]), steps, 40.0, 1)
    assert found.n_preempted == 1
    assert found.stalls[0].tolist() == [1]
    assert found.finish_s[1] > found.finish_s[0]
    # Its gap holds the rest of the first request's decode and its own recomputation.
    assert found.stalls[1][0] > 5e-3


def test_round_robin_halves_the_load() -> None:
    work = load([0.0] * 4, [50] * 4, [10] * 4)
    alone = simulate(load([0.0] * 2, [50] * 2, [10] * 2), table(), 1e9, 1)
    both = simulate(work, table(), 1e9, 2, router="round_robin")
    assert both.finish_s.max() == pytest.approx(alone.finish_s.max())
    assert both.replica.tolist() == [0, 1, 0, 1]


def test_closed_loop_keeps_its_sessions() -> None:
    """Eight requests by two sessions: the third begins when the first is answered."""
    work = load([0.0] * 8, [20] * 8, [5] * 8)
    found = simulate(work, table(), 1e9, 1, sessions=2)
    starts = np.sort(found.arrival_s)
    assert starts[:2].tolist() == [0.0, 0.0]
    assert set(starts[2:]) <= set(found.finish_s)
    for t in found.finish_s[:-2]:
        open_now = np.sum((found.arrival_s <= t) & (found.finish_s > t))
        assert open_now <= 2


def test_hopeless_runs_stop_early() -> None:
    n = 2000
    work = load([0.0] * n, [60] * n, [2] * n)
    found = simulate(work, table(), 1e9, 1, ttft_limit_s=np.full(n, 0.05), allowed_late=20)
    assert found.aborted
    fine = simulate(work, table(), 1e9, 1, ttft_limit_s=np.full(n, 1e6), allowed_late=20)
    assert not fine.aborted
