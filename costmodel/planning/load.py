"""What each request asks of a replica under a method: tokens to prefill, state held, bytes read.

A request's state grows along a straight line from the end of its prompt to its last token. The line
is drawn through the two exact ends of the method's own state formula and lifted over whatever lies
above it between them (a quantiser's residual, a window that fills), so it never promises memory
that the method would need.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from costmodel.memory import memory_of, state_of
from costmodel.model import Model
from costmodel.planning.pricing import StepBuilder
from costmodel.planning.requests import Requests

Floats = NDArray[np.float64]
#: Requests whose state is evaluated at once.
_ROWS = 1 << 15
#: Where between first and last token the state is looked at: eighths, and the first block or two.
_SHARES = np.arange(9) / 8.0
_OFFSETS = np.array([1.0, 16.0, 32.0, 64.0, 96.0, 127.0, 128.0, 192.0, 256.0])


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Load:
    """Arrays over requests, for one candidate.

    arrival_s      as given
    prompt_tokens  tokens that reach the model (after prompt compression)
    cached_tokens  of those, found in the prefix cache
    output_tokens  tokens to generate
    before_s       seconds before the prompt reaches the model (a compressor's own pass)
    held_bytes     state at the end of the prompt; ``held_slope`` more for each generated token
    moved_bytes    bytes moved by the first decode step; ``moved_slope`` more for each one after it
    input_tokens   as the user sent them
    drain_s        from the end of the iteration with its last chunk to its first token: what a
                   pipeline still has to do
    """

    arrival_s: Floats
    input_tokens: Floats
    prompt_tokens: Floats
    cached_tokens: Floats
    output_tokens: Floats
    before_s: Floats
    held_bytes: Floats
    held_slope: Floats
    moved_bytes: Floats
    moved_slope: Floats
    drain_s: Floats | float = 0.0

    @property
    def size(self) -> int:
        """Number of requests."""
        return int(self.arrival_s.size)

    @property
    def peak_bytes(self) -> Floats:
        """State of each request with its last token."""
        return self.held_bytes + self.held_slope * self.output_tokens

    @property
    def decode_steps(self) -> Floats:
        """Decode iterations each needs: its first token comes from the prompt's last chunk."""
        return self.output_tokens - 1.0


def load_of(model: Model, requests: Requests, make: StepBuilder) -> Load:
    """Evaluate the method on every request, a slice at a time."""
    parts = [
        _slice(model, requests, make, slice(i, i + _ROWS)) for i in range(0, requests.size, _ROWS)
    ]
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    prompt, cached, before, held, held_slope, moved, moved_slope = columns
    return Load(
        arrival_s=requests.arrival_s - requests.arrival_s[0],
        input_tokens=requests.input_tokens,
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=requests.output_tokens,
        before_s=before,
        held_bytes=held,
        held_slope=held_slope,
        moved_bytes=moved,
        moved_slope=moved_slope,
    )


def _slice(model: Model, requests: Requests, make: StepBuilder, part: slice) -> tuple[Floats, ...]:
    original = requests.input_tokens[part]
    output = requests.output_tokens[part]
    prompt = np.broadcast_to(
        np.maximum(1.0, np.round(model.run.stack.prompt_tokens(original))), original.shape
    )
    # A compressed prompt keeps the same share of a cached prefix.
    share = requests.prefix_tokens[part] / original
    cached = np.minimum(np.floor(share * prompt), prompt - 1.0)
    compress = model.run.stack.prompt_operations(make.point(np.float64(1.0), original, original))
    before = np.broadcast_to(make.kernels_s(compress) if compress else 0.0, original.shape)
    held, held_slope = _held(model, make, prompt, output)
    last = np.maximum(output - 1.0, 1.0)
    first_moved = np.broadcast_to(make.moved_bytes(prompt, prompt), prompt.shape)
    last_moved = np.broadcast_to(make.moved_bytes(prompt, prompt + last), prompt.shape)
    moved_slope = np.maximum(0.0, (last_moved - first_moved) / last)
    return prompt, cached, before, held, held_slope, first_moved, moved_slope


def _held(model: Model, make: StepBuilder, prompt: Floats, output: Floats) -> tuple[Floats, Floats]:
    """The line of each request's state: (bytes after the prompt, bytes per generated token)."""
    one = np.float64(1.0)
    shares = output[:, None] * _SHARES
    offsets = np.minimum(_OFFSETS, output[:, None])
    steps = np.ceil(np.concatenate([shares, offsets], axis=1))

    def held(prompts: Floats, after: Floats) -> Floats:
        point = make.point(one, prompts, prompts + after)
        # An engine that preallocates makes room for the whole answer at once.
        return np.broadcast_to(state_of(model.run, point)[2], after.shape)

    sample = slice(None, None, max(1, prompt.size // 64))
    start = held(prompt, np.zeros_like(prompt))
    slope = np.maximum(0.0, (held(prompt, output) - start) / output)
    probe = held(prompt[sample, None], steps[sample])
    line = start[sample, None] + slope[sample, None] * steps[sample]
    # Paged caches step by blocks: a straight line lifted by one block covers them all.
    if np.all(probe <= line * (1 + 1e-9)):
        return start, slope
    lift = np.zeros_like(start)
    for k in range(steps.shape[1]):
        above = held(prompt, steps[:, k]) - (start + slope * steps[:, k])
        lift = np.maximum(lift, above)
    return start + lift, slope


def pool_bytes(model: Model, longest_prompt: float, longest_output: float, max_batch: int) -> float:
    """Bytes per GPU left for state: capacity less weights, what the engine reserves, and the
    largest transient of the longest prompt or of a full decode batch, as ``predict`` counts them.
    """
    capacity = model.run.hardware.memory_bytes * model.options.memory_fraction

    def transient(batch: float, prompt: float, output: float) -> float:
        """Peak less state, over both phases."""
        b, c, n = np.float64(batch), np.float64(prompt), np.float64(output)
        point = model.point(b, c, n)
        memory = memory_of(model.run, point, n, model.prefill(b, c, n))
        prompt_state = memory.state_allocated_bytes
        last = state_of(model.run, point.at(point.prompt_tokens + n))[2]
        after_prompt = memory.peak_prefill_bytes - prompt_state
        after_last = memory.peak_decode_bytes - np.maximum(prompt_state, last)
        return float(np.max(np.maximum(after_prompt, after_last)))

    fixed = max(transient(1.0, longest_prompt, longest_output), transient(max_batch, 1.0, 1.0))
    return capacity - fixed
