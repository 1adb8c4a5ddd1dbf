"""One engine with continuous batching, moved from event to event.

Every iteration takes one token of each decoding sequence and, with what is left of
``chunk_tokens``, prompts in order of arrival, the first of them in chunks. A prompt is admitted
when the pool has room for its state; when decoding sequences outgrow the pool, the one admitted
last is put back to the front of the queue and later recomputed. Admission and preemption are vLLM's
(first come first served, recompute, the last admitted goes first).

Between two events nothing but the lengths changes: iterations then follow one another in closed
form. With a = D(n, R) and R growing by R1 per iteration, m of them take m a + b m (m - 1) / 2, b
the slope of D times R1. An event is a finished sequence, a new request, a full pool or a knot of D.
"""

from array import array
from bisect import bisect_right
from collections import deque
from heapq import heappop, heappush
from math import ceil, inf, sqrt

from costmodel.planning.steps import StepTable
from costmodel.planning.work import Work


class Replica:
    """State of one replica. Sums over the decoding sequences are straight lines in the iteration
    counter ``step``: R = r0 + r1 step (bytes moved), and h0 + h1 step (bytes reserved, with those
    of the prompt in work).
    """

    __slots__ = (
        "admitted", "current", "decode_s", "end", "epoch", "finishing", "first_gap_s",
        "gap_counts", "gap_slope", "gap_starts", "h0", "h1", "held_byte_s", "joined", "m", "mixed",
        "n", "n_preempted", "outstanding", "peak_bytes", "pool", "prefill_s", "progress", "r0",
        "r1", "ready", "stamp", "step", "steps", "t", "waiting", "work",
    )  # fmt: skip

    def __init__(self, steps: StepTable, pool: float, work: Work) -> None:
        self.steps, self.pool, self.work = steps, pool * (1 + 1e-12), work
        self.t, self.end, self.mixed = 0.0, inf, False
        self.m = self.step = self.n = self.outstanding = self.stamp = self.n_preempted = 0
        self.r0 = self.r1 = self.h0 = self.h1 = 0.0
        self.waiting: deque[int] = deque()
        self.current, self.progress = -1, 0
        self.ready: list[int] = []
        self.finishing: list[tuple[int, int, int]] = []
        self.admitted: list[tuple[int, int]] = []
        self.epoch: dict[int, int] = {}
        self.joined: dict[int, int] = {}
        # Gaps between tokens, one entry per event: m iterations of n sequences.
        self.gap_starts, self.first_gap_s = array("d"), array("d")
        self.gap_slope, self.gap_counts = array("d"), array("q")
        self.prefill_s = self.decode_s = self.held_byte_s = self.peak_bytes = 0.0

    # Requests --------------------------------------------------------------------------------

    def enqueue(self, i: int, now: float) -> bool:
        """A request arrives; True when the end of the present event changed."""
        self.outstanding += 1
        waiting = self.waiting
        behind = bool(waiting)
        waiting.append(i)
        if self.end == inf:
            self.end = now  # idle until now; whatever arrives at this very time starts together
            return True
        if self.mixed or behind or self.n >= self.steps.max_batch or self.m <= 1:
            return False
        return self._cut(now)

    def _cut(self, now: float) -> bool:
        """End the run of iterations at the first boundary that sees the new request."""
        a, b, elapsed = self.first_gap_s[-1], self.gap_slope[-1], now - self.t
        half = b / 2
        if b > 0:
            c = a - half
            m = ceil((sqrt(c * c + 4 * half * elapsed) - c) / b) if elapsed > 0 else 1
        else:
            m = ceil(elapsed / a)
        m = 1 if m < 1 else m
        while m > 1 and (m - 1) * (a + half * (m - 2)) >= elapsed:
            m -= 1
        while m * (a + half * (m - 1)) < elapsed:
            m += 1
        if m >= self.m:
            return False
        self.m = m
        self.end = self.t + m * (a + half * (m - 1))
        self.gap_counts[-2] = m
        return True

    # Events ----------------------------------------------------------------------------------

    def advance(self) -> None:
        """Finish the present event and start the next."""
        self.settle()
        self.start(self.end)

    def settle(self) -> int:
        """Finish the present event; returns how many requests were completed."""
        now, work = self.end, self.work
        start, elapsed = self.step, now - self.t
        step = self.step = start + self.m
        if self.mixed:
            self.held_byte_s += (self.h0 + self.h1 * start) * elapsed
        elif self.m:
            self.held_byte_s += (self.h0 + self.h1 * (start + step - 1) / 2) * elapsed
            self.decode_s += elapsed
            peak = self.h0 + self.h1 * (step - 1)
            if peak > self.peak_bytes:
                self.peak_bytes = peak
        before = self.outstanding
        finishing, epoch = self.finishing, self.epoch
        while finishing and finishing[0][0] <= step:
            _, i, stamp = heappop(finishing)
            if epoch.get(i) == stamp:
                self._leave(i)
                work.finish_s[i] = now
                self.outstanding -= 1
        for i in self.ready:
            self._join(i, now)
        self.ready = []
        self.m = 0
        return before - self.outstanding

    def _leave(self, i: int) -> int:
        """Take a decoding sequence out of the sums; returns how many tokens it has generated."""
        work = self.work
        at = self.joined.pop(i)
        del self.epoch[i]
        g = work.generated[i]
        self.n -= 1
        if self.n == 0:
            self.r0 = self.r1 = 0.0
        else:
            slope = work.moved_slope[i]
            self.r0 -= work.moved[i] + slope * (g - 1 - at)
            self.r1 -= slope
        slope = work.held_slope[i]
        self.h0 -= work.held[i] + slope * (g - at)
        self.h1 -= slope
        return g + self.step - at

    def _join(self, i: int, now: float) -> None:
        """The last chunk of a prompt is done: a token comes out, and the sequence decodes."""
        work = self.work
        g = work.generated[i]
        if g == 0:
            work.first_s[i] = now
            if now - work.arrival[i] > work.ttft_limit[i]:
                work.n_late += 1
        else:
            work.stall(i, now)
        held, slope = work.held[i], work.held_slope[i]
        self.h0 -= held + slope * g
        g += 1
        work.generated[i] = g
        left = work.output[i] - g
        if left == 0:
            work.finish_s[i] = now
            self.outstanding -= 1
            del self.epoch[i]
            return
        step = self.step
        self.joined[i] = step
        self.n += 1
        self.h0 += held + slope * (g - step)
        self.h1 += slope
        slope = work.moved_slope[i]
        self.r0 += work.moved[i] + slope * (g - 1 - step)
        self.r1 += slope
        heappush(self.finishing, (step + left, i, self.epoch[i]))

    def start(self, now: float) -> None:
        """Decide what runs next, from iteration boundary ``now``."""
        self.t = now
        self.stamp += 1
        if self.n == 0 and self.current < 0:
            self.h0 = self.h1 = 0.0
        reserved = self.h0 + self.h1 * self.step
        crowded = reserved > self.pool
        if crowded:
            reserved = self._make_room(now)
        tokens, chunks_s = 0, 0.0
        if self.current >= 0 or (self.waiting and not crowded):
            tokens, chunks_s = self._fill(reserved, crowded)
        if tokens:
            self._mixed(now, tokens, chunks_s)
        elif self.n:
            self._bulk(now)
        else:
            self.mixed, self.m, self.end = False, 0, inf

    def _fill(self, reserved: float, crowded: bool) -> tuple[int, float]:
        """Give the iteration's free tokens to prompts: (tokens, seconds of mixing)."""
        steps, work, waiting = self.steps, self.work, self.waiting
        budget = steps.chunk_tokens - self.n
        i, tokens, seconds = self.current, 0, 0.0
        while budget > 0:
            if i < 0:
                if not waiting or crowded or self.n + len(self.ready) >= steps.max_batch:
                    break
                i = waiting[0]
                g = work.generated[i]
                held, slope = work.held[i], work.held_slope[i]
                if reserved + held + slope * (g + 1) > self.pool:
                    i = -1
                    break
                waiting.popleft()
                self.h0 += held + slope * g
                reserved += held + slope * g
                self.progress = work.cached[i]
                seconds += work.before[i]
                self.epoch[i] = self.stamp
                self.admitted.append((i, self.stamp))
            at = self.progress
            left = work.prompt[i] + work.generated[i] - at
            if left <= budget:
                seconds += steps.chunk_s(at, left)
                tokens += left
                budget -= left
                self.ready.append(i)
                i = -1
            else:
                seconds += steps.chunk_s(at, budget)
                tokens += budget
                self.progress = at + budget
                break
        self.current = i
        if reserved > self.peak_bytes:
            self.peak_bytes = reserved
        return tokens, seconds

    def _mixed(self, now: float, tokens: int, chunks_s: float) -> None:
        """One iteration that carries prompt tokens."""
        steps, n = self.steps, self.n
        moved = self.r0 + self.r1 * self.step
        time = steps.mixed_s(n, moved, tokens, chunks_s)
        decode = steps.decode_s(n, moved) if n else 0.0
        self.mixed, self.m, self.end = True, 1, now + time
        self.decode_s += decode
        self.prefill_s += time - decode
        if n:
            self._log(now, time, 0.0, 1)

    def _bulk(self, now: float) -> None:
        """As many decode iterations as nothing interrupts."""
        step, n, finishing, epoch = self.step, self.n, self.finishing, self.epoch
        while epoch.get(finishing[0][1]) != finishing[0][2]:
            heappop(finishing)
        m = finishing[0][0] - step
        if self.h1 > 0:
            room = (self.pool - self.h0 - self.h1 * step) / self.h1
            if room + 1 < m:
                m = int(room) + 1
        moved, growth = self.r0 + self.r1 * step, max(self.r1, 0.0)  # sums leave a residue
        steps = self.steps
        knots = steps.knots
        j = 0
        if len(knots) > 1:
            j = bisect_right(knots, moved / n) - 1
            j = 0 if j < 0 else j
            if growth > 0 and j + 1 < len(knots):
                until = ceil((knots[j + 1] * n - moved) / growth)
                if until < m:
                    m = until if until > 1 else 1
        slope = steps.slope[n][j]
        first = steps.base[n][j] + slope * moved
        growth *= slope
        self.mixed, self.m = False, m
        self.end = now + m * (first + growth / 2 * (m - 1))
        self._log(now, first, growth, m)

    def _log(self, now: float, first_s: float, growth_s: float, m: int) -> None:
        self.gap_starts.append(now)
        self.first_gap_s.append(first_s)
        self.gap_slope.append(growth_s)
        self.gap_counts.append(m)
        self.gap_counts.append(self.n)

    def _make_room(self, now: float) -> float:
        """Preempt the last admitted until the next iteration fits; returns what is reserved."""
        work, admitted, epoch = self.work, self.admitted, self.epoch
        while True:
            reserved = self.h0 + self.h1 * self.step
            if reserved <= self.pool:
                return reserved
            i, stamp = admitted.pop()
            if epoch.get(i) != stamp:
                continue
            self.n_preempted += 1
            if i == self.current:
                self.h0 -= work.held[i] + work.held_slope[i] * work.generated[i]
                del epoch[i]
                self.current, self.progress = -1, 0
            else:
                work.generated[i] = self._leave(i)
                work.stalled_since[i] = now
            work.cached[i] = work.kept[i]
            self.waiting.appendleft(i)
