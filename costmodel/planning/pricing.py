"""The parts of an engine iteration, priced by the cost model at whole grids of points.

See ``steps`` for what D, L, G and Q are.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from costmodel.layout import decode_operations, mixing_operations, token_operations, total
from costmodel.model import Model
from costmodel.operation import Array, Operation, Operations
from costmodel.phase import overhead_s, phase_time
from costmodel.planning.parallel import Parallel
from costmodel.workload import Point

Floats = NDArray[np.float64]
#: Which end of the interval of kernel times.
Estimate = Literal["low", "mid", "high"]


class StepBuilder:
    """Prices the parts of an iteration with one ``Model``."""

    def __init__(self, model: Model, parallel: Parallel, estimate: Estimate) -> None:
        self.model = model
        self.run = model.run
        self.parallel = parallel
        self.index = {"low": 0, "mid": 1, "high": 2}[estimate]
        #: Seconds priced so far by their basis.
        self.bases: dict[str, float] = {}
        on_host = model.run.hardware.is_cpu
        self.n_layers = model.architecture.n_layers
        known = overhead_s(model.engine, n_layers=self.n_layers)
        self.overhead_s = 0.0 if on_host else known[self.index]

    def point(self, batch: Array, prompt: Array, cached: Array) -> Point:
        """A point whose prompt has the length that reaches the model."""
        one = self.model.point(np.float64(1.0), np.float64(1.0), np.float64(1.0))
        return replace(
            one, batch=batch, prompt_tokens=prompt, cached_tokens=cached, reserved_tokens=cached + 1
        )

    def pass_s(self, operations: Operations, *, graph: bool = True) -> Array:
        """Time of a pass with its overhead."""
        time = phase_time(
            operations,
            self.run.hardware,
            self.model.engine,
            level=self.model.options.level,
            graph=graph,
            n_layers=self.n_layers,
        )
        for basis, seconds in time.bases.items():
            self.bases[basis] = self.bases.get(basis, 0.0) + seconds
        return (time.low_s, time.mid_s, time.high_s)[self.index]

    def kernels_s(self, operations: Operations) -> Array:
        """Time of a pass without it."""
        return self.pass_s(operations) - self.overhead_s

    def moved_bytes(self, prompt: Array, cached: Array) -> Array:
        """R of one sequence: what its mixers move in the step that reads ``cached`` tokens."""
        point = self.point(np.float64(1.0), prompt, cached)
        return total(mixing_operations(self.run, point, decode=True), _moved)

    def decode(self, max_batch: int, max_tokens: int, max_output: int) -> tuple[Floats, Floats]:
        """(bytes per sequence, D by batch - 1 and bytes), every batch size evaluated."""
        doubling = 2.0 ** np.arange(0, np.ceil(np.log2(max(2, max_tokens))))
        prompts = np.unique(np.append(doubling, float(max_tokens)))
        prompt = np.concatenate([prompts, prompts])
        cached = np.concatenate([prompts, prompts + max_output])
        moved = np.broadcast_to(self.moved_bytes(prompt, cached), prompt.shape)
        batch = np.arange(1.0, max_batch + 1)[:, None]
        point = self.point(batch, prompt[None, :], cached[None, :])
        operations = self.parallel.experts(decode_operations(self.run, point), batch, self.model)
        graph = self.model.engine.decode_graph
        time = np.broadcast_to(self.pass_s(operations, graph=graph), (max_batch, prompt.size))
        order = np.argsort(moved, kind="stable")
        moved, time = moved[order], time[:, order]
        starts = np.flatnonzero(np.diff(moved, prepend=-np.inf) > 1e-9 * (1.0 + moved))
        counts = np.diff(np.append(starts, moved.size))
        time = np.add.reduceat(time, starts, axis=1) / counts
        return moved[starts], np.maximum.accumulate(time, axis=1)

    def tokens(self, counts: Floats) -> Floats:
        """L at so many tokens."""
        point = self.point(np.float64(1.0), np.float64(1.0), np.float64(1.0))
        operations = token_operations(self.run, point, counts)
        time = self.kernels_s(self.parallel.experts(operations, counts, self.model))
        return np.broadcast_to(time, counts.shape)

    def prompts(self, lengths: Floats) -> tuple[Floats, Floats, float]:
        """(G, Q, floor) at prompt lengths of at least 1."""
        one = np.float64(1.0)

        def prefill_s(tokens: Array) -> Array:
            """What mixing adds to the rest of the pass (transfers may hide behind it)."""
            point = self.point(one, tokens, tokens)
            rest = token_operations(self.run, point, tokens)
            mixing = mixing_operations(self.run, point, decode=False)
            return self.kernels_s((*mixing, *rest)) - self.kernels_s(rest)

        def read_s(tokens: Array) -> Array:
            point = self.point(one, tokens, tokens)
            return self.kernels_s(mixing_operations(self.run, point, decode=True))

        floor = float(np.max(prefill_s(one)))
        grown = np.broadcast_to(prefill_s(lengths), lengths.shape) - floor
        read = np.broadcast_to(read_s(lengths), lengths.shape) - float(np.max(read_s(one)))
        return np.maximum.accumulate(np.maximum(grown, 0.0)), np.maximum(read, 0.0), floor

    def alone_s(self) -> float:
        """An iteration without decoding sequences: the head for one prompt, and the overhead."""
        one = np.float64(1.0)
        point = self.point(one, one, one)
        head = [op for op in decode_operations(self.run, point) if op.name == "lm_head"]
        return float(np.max(self.pass_s(tuple(head))))

    def host_s(self) -> float:
        """Host time to start the kernels of an iteration that is not replayed from a graph."""
        one = np.float64(1.0)
        point = self.point(one, one, one)
        operations = (
            *mixing_operations(self.run, point, decode=False),
            *token_operations(self.run, point, one),
        )
        if self.run.hardware.is_cpu:
            return 0.0
        launches = float(np.max(total(operations, _launches)))
        return launches * self.model.engine.host_launch_s[self.index] + self.overhead_s


def _moved(op: Operation) -> Array:
    return op.state_bytes + op.workspace_bytes + op.activation_bytes + op.link_bytes


def _launches(op: Operation) -> Array:
    return np.float64(op.launches)
