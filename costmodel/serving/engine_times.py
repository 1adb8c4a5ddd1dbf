"""Times of an engine's steps, prompts and requests from physical parameters.

    step    = t0 + L t_layer + a matmuls + b attention + a other + m experts + L_e t_expert
              + c collectives
    prompt  = t_s + t0 + L t_layer + p (matmuls + b_p attention + other) + m_p experts
              + c collectives
    TPOT    = step + q (n - 1) (prompt without its constants) / output tokens

Decode attention takes b times its family's time where b > 1; below, only what it takes beyond its
roofline at the bandwidth it attains shrinks, for no graph moves bytes faster. A step and a prompt
are at least what the host needs to start their kernels where there is no captured graph. Under
continuous batching a request decodes while the n - 1 others of its rank are admitted once per
output it makes: their prefill stands between its tokens (q = 1), less where prompts are admitted
together before anybody decodes. n is what fits in the KV pool when that is less than the load.

    t0  host time per step                    t_layer   gaps between kernels of a layer
    a   kernels in a step against alone       b         decode attention against its family
    m   expert roofline to attained time      t_expert  fixed cost of an expert layer
    p   kernels of a prompt against alone     b_p       attention of a prompt against its family
    c   collectives against their tables      t_s       what the first token takes besides

What is ignored: preemption, lengths that vary, batches smaller than the load while prompts wait,
speculative decoding.
"""

import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import numpy as np

from costmodel.intervals import factors
from costmodel.operation import Array
from costmodel.serving.parameters import Facts, Parameters
from costmodel.serving.served import Parts, Served

#: Keys of an engine's parameters in ``serving.toml``.
DENSE_KEY, SPARSE_KEY = "parameters", "sparse_parameters"
#: Engine whose parameters stand for any other: fitted on the runs of all engines together.
POOLED = "any"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Load:
    """A constant load on one replica; arrays that broadcast.

    concurrency     requests in the system at any time
    input_tokens, output_tokens   of each
    """

    concurrency: Array
    input_tokens: Array
    output_tokens: Array

    @property
    def mean_tokens(self) -> Array:
        """Cached tokens of a request half way through its output."""
        return np.asarray(self.input_tokens) + np.asarray(self.output_tokens) / 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimes:
    """One engine: its parameters, facts, and how far off they were on runs no fit had seen.

    parameters  of dense models
    sparse_parameters  of models with routed experts; None: the same
    scatter     mean size of those errors (logarithms) by class of metric ("tpot_dense", ...) and
                GPU, "" for any other: costmodel/intervals.py
    held_out    errors on them in percent, by the same classes
    """

    name: str
    parameters: Parameters
    sparse_parameters: Parameters | None = None
    facts: Facts
    n_rows: int = 0
    scatter: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    held_out: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def of(self, served: Served) -> Parameters:
        """The parameters of a model's class."""
        sparse = self.sparse_parameters if served.n_expert_layers else None
        return sparse or self.parameters

    def step_s(self, served: Served, sequences: Array, tokens: Array) -> Array:
        """Seconds of a decode step that nothing interferes with."""
        return step_from(self.of(served), served, served.step(sequences, tokens))

    def prompt_s(self, served: Served, tokens: Array, prompts: Array = 1.0) -> Array:
        """Seconds from the start of a prefill of ``prompts`` prompts a rank to its first token."""
        return prompt_from(self.of(served), served, served.prefill(tokens, prompts))

    def tpot_s(self, served: Served, load: Load) -> Array:
        """Seconds per output token under continuous batching. Shape: that of the load."""
        return tpot_from(self.of(served), served, self.terms(served, load))

    def terms(self, served: Served, load: Load) -> "Terms":
        """Parts of the step and of a prompt at the load, limited to what fits in memory."""
        concurrency, prompt, output = np.broadcast_arrays(
            *(
                np.asarray(x, dtype=np.float64)
                for x in (load.concurrency, load.input_tokens, load.output_tokens)
            )
        )
        fits = served.most_sequences(load.mean_tokens, self.facts.memory_fraction)
        here = np.minimum(concurrency, fits)
        others = np.maximum(here / served.deployment.dp - 1.0, 0.0)
        return Terms(
            step=served.step(here, load.mean_tokens),
            prompt=served.prefill(prompt),
            prompts_per_token=others / output,
        )

    def basis(self, kind: str, gpu: str) -> Literal["calibrated", "transferred"]:
        """Calibrated where runs of this engine on this GPU were fitted, of the same class of models
        as the class of metric ``kind``.
        """
        models = kind.rpartition("_")[2]
        own = any(gpu in s for name, s in self.scatter.items() if name.endswith(models))
        return "calibrated" if own else "transferred"

    def interval(self, kind: str, mid: Array, gpu: str) -> tuple[Array, Array]:
        """(low, high) around a time of a class of metric.

        A class the engine has no runs of takes the interval of engines left out of the fit of all;
        a GPU it has none of, that of GPUs left out. A class no engine has runs of (first tokens of
        sparse models) errs as that metric does of other models, and as other metrics of such models
        do: the worst of either, added as squares.
        """
        table = self if kind in self.scatter else load_engine_times(POOLED)
        scatter = table.scatter.get(kind)
        if scatter is None:
            ends = kind.split("_")
            size = math.hypot(
                *(
                    max(s[""] for name, s in table.scatter.items() if e in name.split("_"))
                    for e in ends
                )
            )
        else:
            size = scatter.get(gpu, scatter[""])
        low, high = factors(size)
        return mid * low, mid * high


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Terms:
    """What the formula of the time per output token multiplies its parameters with."""

    step: Parts
    prompt: Parts
    prompts_per_token: Array


def step_from(p: Parameters, served: Served, parts: Parts) -> Array:
    """A decode step; see the module's docstring."""
    b = p.attention_factor
    attention = np.maximum(
        parts.attention_s, p.packed_attention_factor * parts.unpacked_attention_s
    )
    device = (
        p.layer_s * served.n_layers
        + p.matmuls(served.matmul_precision) * parts.matmul_s
        + p.matmul_factor * parts.other_s
        + b * attention
        + max(1.0 - b, 0.0) * np.minimum(parts.attention_roofline_s, attention)
        + p.expert_factor(served.precision) * parts.expert_s
        + p.expert_layer_s * served.n_expert_layers
        + p.collective_factor * parts.collective_s
    )
    if not served.engine.decode_graph:
        device = np.maximum(device, parts.launches * served.engine.host_launch_s[1])
    seconds: Array = p.step_s + device
    return seconds


def prompt_work_from(p: Parameters, served: Served, parts: Parts) -> Array:
    """The part of a prompt that grows with it: what stands between others' tokens."""
    narrow = p.narrow(served.matmul_precision)
    seconds: Array = (
        p.prefill_factor
        * (narrow * parts.matmul_s + p.prompt_attention_factor * parts.attention_s + parts.other_s)
        + p.expert_factor_prefill * parts.expert_s
        + p.collective_factor * parts.collective_s
    )
    return seconds


def prompt_from(p: Parameters, served: Served, parts: Parts) -> Array:
    """A prefill with its first token; see the module's docstring."""
    device = (
        p.layer_s * served.n_layers
        + p.expert_layer_s * served.n_expert_layers
        + prompt_work_from(p, served, parts)
    )
    seconds: Array = (
        p.start_s + p.step_s + np.maximum(device, parts.launches * served.engine.host_launch_s[1])
    )
    return seconds


def tpot_from(p: Parameters, served: Served, terms: Terms) -> Array:
    """Time per output token under continuous batching; see the module's docstring."""
    between = terms.prompts_per_token * prompt_work_from(p, served, terms.prompt)
    seconds: Array = step_from(p, served, terms.step) + p.prefill_share * between
    return seconds


@functools.cache
def _table(name: str) -> dict[str, Any]:
    text = resources.files("costmodel").joinpath(f"data/{name}.toml").read_text("utf-8")
    return tomllib.loads(text)


def known_engines() -> list[str]:
    """Engines with facts, and so with parameters, of their own."""
    return [name for name in _table("serving_engines") if name != POOLED]


def facts_of(name: str) -> Facts:
    """An engine's facts; those of any engine where it has none."""
    table = _table("serving_engines")
    row = dict(table.get(name, table[POOLED]))
    row.pop("sources")
    return Facts(**row)


@functools.cache
def load_engine_times(name: str) -> EngineTimes:
    """The parameters of an engine; those of all engines together, marked, where it has none."""
    key = name.strip().lower()
    fitted = _table("serving")["engine"]
    own = key in fitted and key != POOLED
    row = fitted[key] if own else fitted[POOLED]
    dense, sparse = (
        Parameters(**row.get(name, fitted[POOLED][name])) for name in (DENSE_KEY, SPARSE_KEY)
    )
    return EngineTimes(
        name=key,
        parameters=dense,
        sparse_parameters=sparse,
        facts=facts_of(key),
        n_rows=row["n_rows"],
        scatter={
            k: {"": v["scatter"], **v["gpu_scatter"]} for k, v in row["held_out_percent"].items()
        },
        held_out=row["held_out_percent"],
    )
