"""What tables and users measure of an engine, as functions of its parameters.

tpot     seconds per output token under continuous batching at a constant load
step     seconds per output token of a static batch
ttft     seconds to the first token of prompts that wait for nobody
run      seconds per output token of a static batch, its prefill shared out
request  seconds per output token of a request under a constant load, its prefill included
offline  seconds per output token of the whole replica, as many requests as fit
"""

from collections.abc import Callable

import numpy as np

from costmodel.operation import Array
from costmodel.serving.engine_times import (
    EngineTimes,
    Load,
    prompt_from,
    prompt_work_from,
    step_from,
    tpot_from,
)
from costmodel.serving.parameters import Parameters
from costmodel.serving.served import Served

KINDS = ("tpot", "step", "ttft", "run", "request", "offline")
Metric = Callable[[Parameters], Array]

#: Engines admit at most so many requests to one step in published offline runs.
MOST_SEQUENCES = 2048.0


def metric(kind: str, times: EngineTimes, served: Served, load: Load) -> Metric:
    """The metric at a load, with everything but the parameters worked out.

    Raises ``AssertionError`` for a kind that is not in ``KINDS``.
    """
    if kind == "tpot":
        terms = times.terms(served, load)
        return lambda p: tpot_from(p, served, terms)
    if kind == "ttft":
        prompts = np.asarray(load.concurrency) / served.deployment.dp
        prompt = served.prefill(load.input_tokens, np.maximum(prompts, 1.0))
        return lambda p: prompt_from(p, served, prompt)
    fits = served.most_sequences(load.mean_tokens, times.facts.memory_fraction)
    here = np.minimum(load.concurrency, fits)
    output = np.asarray(load.output_tokens, dtype=np.float64)
    if kind == "step":
        step = served.step(here, load.mean_tokens)
        return lambda p: step_from(p, served, step)
    if kind == "run":
        return _run(times, served, load, here, output)
    if kind == "request":
        terms = times.terms(served, load)
        alone = served.prefill(load.input_tokens)
        return lambda p: (
            (prompt_from(p, served, alone) + (output - 1.0) * tpot_from(p, served, terms)) / output
        )
    assert kind == "offline", kind
    most = np.minimum(fits, MOST_SEQUENCES * served.deployment.dp)
    full = served.step(most, load.mean_tokens)
    one = served.prefill(load.input_tokens)
    ranks = float(served.deployment.dp)
    return lambda p: (
        step_from(p, served, full) / most + prompt_work_from(p, served, one) / output / ranks
    )


def _run(times: EngineTimes, served: Served, load: Load, here: Array, output: Array) -> Metric:
    """Rounds of as many sequences as fit: one prefill and output - 1 steps each."""
    rounds = np.ceil(np.asarray(load.concurrency) / np.maximum(np.floor(here), 1.0))
    batch = np.asarray(load.concurrency) / rounds
    step = served.step(batch, load.mean_tokens)
    prompts = np.maximum(batch / served.deployment.dp, 1.0)
    prompt = served.prefill(load.input_tokens, prompts)
    return lambda p: (
        rounds
        * (prompt_from(p, served, prompt) + (output - 1.0) * step_from(p, served, step))
        / output
    )


def roofline_s(kind: str, served: Served, load: Load) -> Array:
    """The same metric at datasheet rates, everything overlapped, nothing else in the way."""
    output = np.asarray(load.output_tokens, dtype=np.float64)
    if kind == "ttft":
        prompts = np.maximum(np.asarray(load.concurrency) / served.deployment.dp, 1.0)
        return served.prefill(load.input_tokens, prompts).roofline_s
    if kind in ("tpot", "step"):
        return served.step(load.concurrency, load.mean_tokens).roofline_s
    if kind == "offline":
        fits = np.minimum(served.most_sequences(load.mean_tokens, 1.0), MOST_SEQUENCES)
        step = served.step(fits, load.mean_tokens).roofline_s
        return step / fits + served.prefill(load.input_tokens).roofline_s / output
    prompts = np.ones(np.shape(load.concurrency))
    if kind == "run":
        prompts = np.maximum(np.asarray(load.concurrency) / served.deployment.dp, 1.0)
    prompt = served.prefill(load.input_tokens, prompts).roofline_s
    step = served.step(load.concurrency, load.mean_tokens).roofline_s
    seconds: Array = (prompt + (output - 1.0) * step) / output
    return seconds
