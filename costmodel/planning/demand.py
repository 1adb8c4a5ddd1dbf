"""What the fleet must serve: a trace, a rate, a number of users, or a concurrency."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from costmodel.errors import ConfigError
from costmodel.planning.arrivals import Arrivals
from costmodel.planning.lengths import Lengths
from costmodel.planning.requests import Requests
from costmodel.planning.traces import read_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The ``[workload]`` of a plan, checked.

    kind            "trace", "rate", "users" or "concurrency"
    rate_per_s      of "rate" and "users", before ``scale`` and ``growth``
    concurrency     sessions that each send a request as soon as the last is answered
    prefix_share    share of each prompt that a prefix cache holds; None: the trace's own blocks
    output_factors  method name or spec -> how much longer its answers are; "*" any but full
    n_requests      how many are drawn when there is no trace
    """

    kind: Literal["trace", "rate", "users", "concurrency"]
    trace: Path | None = None
    rate_per_s: float | None = None
    concurrency: int | None = None
    scale: float = 1.0
    growth: float = 1.0
    arrivals: Arrivals
    prefix_share: float | None = 0.0
    input_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    output_factors: Mapping[str, float] = field(default_factory=dict)
    n_requests: int = 10_000
    seed: int = 0

    @property
    def is_closed(self) -> bool:
        """A closed loop: the answers decide when the next request comes."""
        return self.kind == "concurrency"

    @property
    def sessions(self) -> int | None:
        """Concurrent sessions of a closed loop, growth included."""
        if self.concurrency is None:
            return None
        return max(1, round(self.concurrency * self.scale * self.growth))

    def requests(self) -> Requests:
        """The stream at the planned load; the same for the same seed."""
        rng = np.random.default_rng(self.seed)
        if self.kind == "trace":
            assert self.trace is not None
            stream = self._of_trace(read_trace(self.trace), rng)
        else:
            stream = self._drawn(rng)
        return self._with_prefixes(stream)

    def _of_trace(self, trace: Requests, rng: np.random.Generator) -> Requests:
        faster = self.scale * self.growth
        if self.arrivals.kind == "trace":
            return trace.faster(faster)
        rate = trace.rate_per_s * faster
        if not np.isfinite(rate):
            raise ConfigError(
                f"{trace.name}: all requests arrive at once, so the trace has no rate; "
                'give rate_per_s, or use arrivals = "trace"'
            )
        times = self.arrivals.times(trace.size, rate, rng)
        return Requests(
            name=trace.name,
            arrival_s=times,
            input_tokens=trace.input_tokens,
            output_tokens=trace.output_tokens,
            prefix_tokens=trace.prefix_tokens,
            notes=(*trace.notes, f"arrivals drawn: {self.arrivals.kind}"),
        )

    def _drawn(self, rng: np.random.Generator) -> Requests:
        assert self.input_tokens is not None
        assert self.output_tokens is not None
        n = self.n_requests
        prompt = self.input_tokens.sample(n, rng)
        output = self.output_tokens.sample(n, rng)
        if self.is_closed:
            times, name = np.zeros(n), f"{self.sessions} sessions"
        else:
            assert self.rate_per_s is not None
            rate = self.rate_per_s * self.scale * self.growth
            times, name = self.arrivals.times(n, rate, rng), f"{rate:g} requests/s"
        return Requests(
            name=name,
            arrival_s=times,
            input_tokens=prompt,
            output_tokens=output,
            prefix_tokens=np.zeros(n),
            notes=(f"{n:,} requests drawn with seed {self.seed}",),
        )

    def _with_prefixes(self, stream: Requests) -> Requests:
        if self.prefix_share is None:
            return stream
        prefix = np.minimum(
            np.floor(stream.input_tokens * self.prefix_share), stream.input_tokens - 1
        )
        return Requests(
            name=stream.name,
            arrival_s=stream.arrival_s,
            input_tokens=stream.input_tokens,
            output_tokens=stream.output_tokens,
            prefix_tokens=prefix,
            notes=stream.notes,
        )

    def output_factor(self, method_name: str, method_spec: str) -> float:
        """How much longer a method's answers are."""
        for key in (method_spec, method_name):
            if key in self.output_factors:
                return self.output_factors[key]
        return 1.0 if method_name == "full" else self.output_factors.get("*", 1.0)
