"""The closed form: what one replica can sustain at best, and why not more.

A request needs N decode iterations and c prompt tokens with A seconds of mixing. With n sequences
decoding together, a replica that is never idle serves

    x(n) = (n / N) / (D(n, n r) + L(n + c n / N) - L(n) + A n / N)     requests per second,

because n sequences finish n / N requests each iteration, which carries the prompts of as many. n is
limited by memory: the pool holds n <= P / h sequences of mean state h (weighted by the iterations
they stay), and by the engine's largest batch. The stability of a memory-constrained batch server is
rate < replicas * x(n_max).

It is a bound: no queue, no variation between requests, no idle time. Simulation needs 1.0 to 2.3
times the replicas.
"""

from dataclasses import dataclass

import numpy as np

from costmodel.planning.load import Load
from costmodel.planning.slo import DEFAULT_SHARE, Slo
from costmodel.planning.steps import StepTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """Best case of one replica.

    rate_per_s     requests per second it can sustain
    batch          sequences decoding together at that rate
    prefill_s      replica-seconds of prefill per request
    decode_s       replica-seconds of decode per request, at that batch
    kv_s           replica-seconds for which a request fills the whole pool: byte-seconds over
                   the pool; above prefill_s + decode_s memory binds
    memory_binds   a larger pool would raise the rate
    """

    rate_per_s: float
    batch: float
    prefill_s: float
    decode_s: float
    kv_s: float
    memory_binds: bool

    def replicas(self, rate_per_s: float) -> int:
        """Fewest replicas that are stable at a rate."""
        return max(1, int(np.ceil(rate_per_s / self.rate_per_s - 1e-9)))


def bound_of(load: Load, steps: StepTable, pool: float) -> Bound:
    """Evaluate x at every batch up to the largest that fits."""
    n_steps = float(load.decode_steps.mean())
    tokens = float((load.prompt_tokens - load.cached_tokens).mean())
    mixing = steps.mixing_s(load.prompt_tokens, load.cached_tokens) + load.before_s
    per_prompt = float(mixing.mean())
    if n_steps == 0.0:
        alone = per_prompt + tokens * steps.token_s(steps.chunk_tokens) / steps.chunk_tokens
        kv = alone * float(load.peak_bytes.mean()) / pool
        return Bound(
            rate_per_s=1.0 / alone,
            batch=0.0,
            prefill_s=alone,
            decode_s=0.0,
            kv_s=kv,
            memory_binds=False,
        )
    weight = load.decode_steps / load.decode_steps.sum()
    half = load.decode_steps / 2
    held = float((weight * (load.held_bytes + load.held_slope * half)).sum())
    moved = float((weight * (load.moved_bytes + load.moved_slope * half)).sum())
    room = pool / max(held, 1e-300)
    n_max = int(np.clip(np.ceil(room), 1, steps.max_batch))
    batch = np.arange(1, n_max + 1)
    decode = np.array([steps.decode_s(n, n * moved) for n in batch.tolist()])
    done = batch / n_steps  # requests finished in one iteration
    prefill = per_prompt + np.array(
        [steps.piggyback_s(n, tokens * n / n_steps) * n_steps / n for n in batch.tolist()]
    )
    iteration = decode + done * prefill
    rate = done / iteration
    if n_max > room and n_max > 1:
        # On average the pool holds a fraction of a sequence more than a whole number.
        rate[-1] = rate[-2] + (rate[-1] - rate[-2]) * (room - (n_max - 1))
    best = int(np.argmax(rate))
    return Bound(
        rate_per_s=float(rate[best]),
        batch=float(min(batch[best], room)),
        prefill_s=float(prefill[best]),
        decode_s=float(decode[best] / done[best]),
        kv_s=n_steps * float(iteration[best]) * held / pool,
        memory_binds=best == batch.size - 1 and room < steps.max_batch,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Miss:
    """Why a candidate is out, and how many times over its limit it is (above 1)."""

    reason: str
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """Latencies of each request alone on an idle replica: no load can make them shorter."""

    ttft_s: np.ndarray
    tpot_s: np.ndarray

    def e2e_s(self, output_tokens: np.ndarray) -> np.ndarray:
        """Arrival to last token alone."""
        alone: np.ndarray = self.ttft_s + self.tpot_s * (output_tokens - 1)
        return alone

    def broken(self, slo: Slo, input_tokens: np.ndarray, output_tokens: np.ndarray) -> Miss | None:
        """An objective that not even an idle fleet meets; None when there is none."""
        e2e = self.e2e_s(output_tokens)
        several = output_tokens > 1
        values = {"ttft": self.ttft_s, "tpot": self.tpot_s[several], "e2e": e2e}
        for limit in slo.limits:
            alone = values.get(limit.metric)
            if alone is None or alone.size == 0:
                continue
            best = float(np.percentile(alone, limit.percentile, method="lower"))
            if best > limit.limit_s:
                text = (
                    f"{limit.metric.upper()} P{limit.percentile:g} is {best:.3g} s on an idle "
                    f"replica, above {limit.limit_s:g} s"
                )
                if limit.metric != "tpot":
                    longest = int(np.argmax(self.ttft_s))
                    text += (
                        f"; the prompt of {int(input_tokens[longest]):,} tokens alone takes "
                        f"{float(self.ttft_s[longest]):.3g} s"
                    )
                return Miss(reason=text, factor=best / limit.limit_s)
        if slo.ttft_s_per_1k_tokens is not None:
            use = self.ttft_s / slo.scaled_ttft_s(input_tokens)
            share, asked = float(np.mean(use <= 1.0)), slo.attainment or DEFAULT_SHARE
            if share < asked:
                return Miss(
                    reason=f"only {share:.1%} of requests meet TTFT of "
                    f"{slo.ttft_s_per_1k_tokens:g} s per 1,000 prompt tokens on an idle replica",
                    factor=float(np.quantile(use, asked)),
                )
        return None


def unloaded(load: Load, steps: StepTable) -> Unloaded:
    """Best case of every request: prompts in full chunks, decode at batch 1.

    The weights are read once per full chunk, and launch floors of chunks are left out, so it is
    slightly below what a lone request takes.
    """
    share = steps.token_s(steps.chunk_tokens) / steps.chunk_tokens
    work = (load.prompt_tokens - load.cached_tokens) * share
    work = work + steps.mixing_s(load.prompt_tokens, load.cached_tokens)
    ttft = steps.alone_s + work + load.before_s + load.drain_s
    middle = load.moved_bytes + load.moved_slope * np.maximum(load.decode_steps - 1, 0) / 2
    return Unloaded(ttft_s=ttft, tpot_s=_decode_alone(steps, middle))


def _decode_alone(steps: StepTable, moved: np.ndarray) -> np.ndarray:
    j = np.maximum(np.searchsorted(np.array(steps.knots), moved, side="right") - 1, 0)
    alone: np.ndarray = np.array(steps.base[1])[j] + np.array(steps.slope[1])[j] * moved
    return alone
