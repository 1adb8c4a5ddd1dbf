"""Kernels inside whole passes against the same kernels measured alone.

Kernel tables hold single kernels, replayed for milliseconds at boost clocks on constant data. In a
pass they run hotter and closer together:

    kernel in a pass = t0 + max(compute_factor compute, memory factor memory)
    pass             = sum of its kernels + n layers x layer_s + host time per step
    first token      = that pass + first_token_s

compute_factor is what sustained power and real operands cost where tensor cores bind; the memory
factors stay near 1 (streaming is not throttled, and prefetch into the next kernel pays for cold
caches). They are the parameters of all engines' published runs together, of which
``costmodel/data/serving.toml`` says what was fitted on how many runs and how far off unseen ones
were. Leaving any engine or any GPU out of that fit moves compute_factor between 1.15 and 1.40, the
memory factors between 0.87 and 1.13, layer_s between 2.2 and 7.8 us and first_token_s between 0.8
and 4.5 ms.
"""

import functools
import math
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

#: Table of ``serving.toml`` that holds the fit of all engines' runs.
_POOLED = "any"
#: Kinds whose memory-bound time takes the attention factor.
_ATTENTION = frozenset(
    {"prefill_attention", "decode_attention", "mla_prefill_attention", "mla_decode_attention"}
)
#: (low, high) share of the middle: how far leaving sources out moves the small constants.
_LAYER_RANGE = (0.5, 2.0)
_FIRST_TOKEN_RANGE = (0.5, 3.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class InSitu:
    """What becomes of kernels in a pass; see the module's docstring.

    compute_factor, matmul_memory_factor, attention_memory_factor, collective_factor
                    time in a pass against alone, by what binds
    layer_s         gaps between the kernels of one layer (low, mid, high)
    first_token_s   what a first token takes besides its prefill (low, mid, high)
    pass_low, pass_high   factors around a pass that held four in five unseen ones
    n_runs          published runs behind it
    """

    compute_factor: float
    matmul_memory_factor: float
    attention_memory_factor: float
    collective_factor: float
    layer_s: tuple[float, float, float]
    first_token_s: tuple[float, float, float]
    pass_low: float
    pass_high: float
    n_runs: int

    def memory_factor(self, kind: str) -> float:
        """The factor on the memory side of an operation kind."""
        return self.attention_memory_factor if kind in _ATTENTION else self.matmul_memory_factor

    def interval(self, low_spread: float, high_spread: float) -> tuple[float, float]:
        """(low, high) factors on a kernel in a pass whose family was transferred with so much
        spread (logarithms): transfers err by themselves, which adds to the scatter of passes as
        squares.
        """
        low = math.hypot(math.log(self.pass_low), low_spread)
        high = math.hypot(math.log(self.pass_high), high_spread)
        return math.exp(-low), math.exp(high)


def _pooled() -> dict[str, Any]:
    """The one table of the file that is needed: reading all of it would be felt at start-up."""
    text = resources.files("costmodel").joinpath("data/serving.toml").read_text("utf-8")
    head = f'[engine."{_POOLED}"]'
    _, found, rest = text.partition(head)
    own, *_ = rest.partition("\n[")
    row: dict[str, Any] = tomllib.loads(found + own)["engine"][_POOLED]
    return row


@functools.cache
def in_situ() -> InSitu:
    """The fit that ships."""
    row = _pooled()
    p = row["parameters"]
    classes = [row["held_out_percent"][name] for name in ("step_dense", "ttft_dense")]
    layer, first = p["layer_s"], p["start_s"]
    return InSitu(
        compute_factor=p["prefill_factor"],
        matmul_memory_factor=p["matmul_factor"],
        attention_memory_factor=p["attention_factor"],
        collective_factor=p["collective_factor"],
        layer_s=(layer * _LAYER_RANGE[0], layer, layer * _LAYER_RANGE[1]),
        first_token_s=(first * _FIRST_TOKEN_RANGE[0], first, first * _FIRST_TOKEN_RANGE[1]),
        pass_low=min(c["low"] for c in classes),
        pass_high=max(c["high"] for c in classes),
        n_runs=row["n_rows"],
    )
