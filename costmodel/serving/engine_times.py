"""Time per output token of an engine under a constant load, from physical parameters.

    step  = t0 + L t_layer + a dense + m experts + L_e t_expert + c collectives
    TPOT  = step + q (n - 1) prefill / output tokens
    prefill = a dense + m_p experts + c collectives, of one prompt

A request decodes while the n - 1 others of its rank are admitted once per output it makes: their
prefill work stands between its tokens (q = 1), less where prompts are admitted together before
anybody decodes. n is what fits in the KV pool when that is less than the load.

    t0       host time per step                     t_layer   gaps between kernels of a layer
    a        kernels in a step against alone        m         expert roofline to attained time
    t_expert fixed cost of an expert layer          c         collectives against their table

What is ignored: preemption, lengths that vary, batches smaller than the load while prompts wait,
speculative decoding.
"""

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from importlib import resources
from typing import Any, Literal

import numpy as np

from costmodel.operation import Array
from costmodel.serving.served import Load, Parts, Served

#: Engine whose parameters stand for any other: fitted on the rows of all engines together.
POOLED = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """What is fitted; units in the names, shares and multipliers without one.

    step_s            host time per step, t0
    layer_s           gaps between the kernels of one layer
    dense_factor      kernels inside a step against their own tables, a
    expert_factor_16, _8, _4   expert roofline to attained time in decode, by bits of the weights
    expert_factor_integer      the same for integer weights, which are widened before they multiply
    expert_factor_prefill      the same in prefill, any format
    expert_layer_s    fixed cost of one layer of experts
    collective_factor collectives inside a step against their tables, c
    prefill_share     share of the others' prefill that stands between two tokens, q
    """

    step_s: float
    layer_s: float
    dense_factor: float
    expert_factor_16: float
    expert_factor_8: float
    expert_factor_4: float
    expert_factor_integer: float
    expert_factor_prefill: float
    expert_layer_s: float
    collective_factor: float
    prefill_share: float

    def expert_factor(self, precision: str) -> float:
        """M for the precision of the weights."""
        if precision in ("int4", "int8"):
            return self.expert_factor_integer
        by_name = {"fp8": self.expert_factor_8, "fp4": self.expert_factor_4}
        return by_name.get(precision, self.expert_factor_16)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """One engine's parameters and what is known about it.

    fp8_cache         keeps an fp8 cache where the weights are fp8 or fp4
    memory_fraction   of the device for weights and KV pool
    latent_prefill    generation -> factor on attention over a latent in prefill, where a GPU's
                      kernel falls back to a slow one
    uncaptured        version -> host time per layer, where decode was not replayed from graphs
    low, high         factors that held 80 to 95 % of rows no fit had seen: dense, sparse models
    held_out          errors on such rows in percent, by "dense" and "sparse"
    """

    name: str
    parameters: Parameters
    n_rows: int
    fp8_cache: bool = False
    memory_fraction: float = 0.93
    latent_prefill: Mapping[str, float] = field(default_factory=dict)
    uncaptured: Mapping[str, float] = field(default_factory=dict)
    low: tuple[float, float] = (0.7, 0.6)
    high: tuple[float, float] = (1.4, 1.7)
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    basis: Literal["calibrated", "transferred"] = "calibrated"

    def tpot_s(
        self, served: Served, load: Load, *, version: str = ""
    ) -> tuple[Array, Array, Array]:
        """(low, mid, high) seconds per output token. Shape: that of the load broadcast."""
        terms = terms_of(self, served, load)
        mid = tpot_from(self.parameters, terms, served.precision)
        mid = np.maximum(mid, host_floor_s(self, served, load, version))
        i = int(served.n_expert_layers > 0)
        low = np.maximum(mid * self.low[i], np.minimum(terms.step.roofline_s, mid))
        return low, mid, mid * self.high[i]

    def ttft_s(self, served: Served, load: Load) -> Array:
        """Seconds to the first token of a request that waits for nobody."""
        p = self.parameters
        prompt = prefill_parts(self, served, load)
        seconds: Array = (
            p.step_s
            + p.layer_s * served.n_layers
            + p.dense_factor * prompt.dense_s
            + p.expert_factor_prefill * prompt.expert_s
            + p.expert_layer_s * served.n_expert_layers
            + p.collective_factor * prompt.collective_s
        )
        return seconds


def host_floor_s(engine: EngineTimes, served: Served, load: Load, version: str) -> Array:
    """Least seconds per step where a version does not replay captured graphs.

    A single request is replayed from a graph even there.
    """
    host = engine.uncaptured.get(version.strip().lower(), 0.0)
    floor: Array = np.where(np.asarray(load.concurrency) > 1.0, host * served.n_layers, 0.0)
    return floor


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Terms:
    """What the formula multiplies its parameters with."""

    step: Parts
    prompt: Parts
    prompts_per_token: Array
    n_layers: float
    n_expert_layers: float


def terms_of(engine: EngineTimes, served: Served, load: Load) -> Terms:
    """Parts of the step and of a prompt at the load, limited to what fits in memory."""
    concurrency, prompt, output = np.broadcast_arrays(
        *(np.asarray(x, dtype=np.float64)
          for x in (load.concurrency, load.input_tokens, load.output_tokens))
    )  # fmt: skip
    mean_tokens = prompt + output / 2.0
    here = np.minimum(concurrency, served.most_sequences(mean_tokens, engine.memory_fraction))
    others = np.maximum(here / served.deployment.dp - 1.0, 0.0)
    return Terms(
        step=served.step(here, mean_tokens),
        prompt=prefill_parts(engine, served, load),
        prompts_per_token=others / output,
        n_layers=float(served.n_layers),
        n_expert_layers=float(served.n_expert_layers),
    )


def prefill_parts(engine: EngineTimes, served: Served, load: Load) -> Parts:
    """Parts of one prompt's prefill, attention slowed down where the engine's kernel is."""
    parts = served.prefill(load.input_tokens)
    slow = engine.latent_prefill.get(served.run.hardware.generation, 1.0)
    if slow == 1.0 or not served.has_latent_attention:
        return parts
    return Parts(
        dense_s=parts.dense_s + (slow - 1.0) * parts.attention_s,
        attention_s=slow * parts.attention_s,
        expert_s=parts.expert_s,
        collective_s=parts.collective_s,
        roofline_s=parts.roofline_s,
    )


def tpot_from(p: Parameters, terms: Terms, precision: str) -> Array:
    """The formula of the module's docstring."""
    step = (
        p.step_s
        + p.layer_s * terms.n_layers
        + p.dense_factor * terms.step.dense_s
        + p.expert_factor(precision) * terms.step.expert_s
        + p.expert_layer_s * terms.n_expert_layers
        + p.collective_factor * terms.step.collective_s
    )
    prompt = (
        p.dense_factor * terms.prompt.dense_s
        + p.expert_factor_prefill * terms.prompt.expert_s
        + p.collective_factor * terms.prompt.collective_s
    )
    seconds: Array = step + p.prefill_share * terms.prompts_per_token * prompt
    return seconds


@functools.cache
def _table(name: str) -> dict[str, Any]:
    text = resources.files("costmodel").joinpath(f"data/{name}.toml").read_text("utf-8")
    return tomllib.loads(text)


def known_engines() -> list[str]:
    """Engines with facts, and so with parameters, of their own."""
    return [name for name in _table("serving_engines") if name != POOLED]


@functools.cache
def load_engine_times(name: str) -> EngineTimes:
    """The parameters of an engine; those of all engines together, marked, where it has none."""
    key = name.strip().lower()
    fitted = _table("serving")["engine"]
    return engine_times(key, fitted[key] if key in fitted else fitted[POOLED])


def engine_times(name: str, fitted: Mapping[str, Any]) -> EngineTimes:
    """An engine's facts with parameters fitted to its runs."""
    facts = _table("serving_engines")
    own = facts.get(name, facts[POOLED])
    known = {f.name for f in fields(Parameters)}
    return EngineTimes(
        name=name,
        parameters=Parameters(
            **{k: float(v) for k, v in fitted["parameters"].items() if k in known}
        ),
        n_rows=fitted["n_rows"],
        fp8_cache=own["fp8_cache"],
        memory_fraction=own["memory_fraction"],
        latent_prefill=own.get("latent_prefill", {}),
        uncaptured=own.get("uncaptured", {}),
        low=tuple(fitted["interval"]["low"]),
        high=tuple(fitted["interval"]["high"]),
        held_out=fitted["held_out_percent"],
        basis="calibrated" if name in facts and name != POOLED else "transferred",
    )
