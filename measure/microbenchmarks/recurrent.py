"""Short convolutions, chunked scans and recurrence steps, run by the engine's own mixers.

A mixer is timed whole but for its projections, whose products are given. What other curves already
cover is taken off, and the rest is its scan.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from costmodel.mixers import AbstractMixer
from costmodel.mixers.delta import DeltaRule
from costmodel.mixers.mamba import Mamba
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.recurrent import convolution
from costmodel.mixers.rglru import RGLRU
from costmodel.mixers.rwkv5 import RWKV5
from costmodel.operation import Operations
from measure.engine import TORCH_DTYPES, random_tensor
from measure.microbenchmarks.bench import Bench
from measure.microbenchmarks.operations import add, named, point, predicted_s
from measure.microbenchmarks.plan import Plan
from measure.mixers import runner_of
from measure.mixers.base import FixedState, RecurrentRunner
from measure.mixers.rglru import RGLRURunner
from measure.numerics import Numerics
from measure.parts import Tensors

#: Width of the model around a mixer that is timed; nothing is multiplied with it.
_D_MODEL = 64
#: Sequences in the larger of the two steps of every mixer.
_BATCH = 8
#: What is left of a difference on a disturbed machine is at least this share.
_LEAST_SHARE = 0.05


def convolutions(bench: Bench, dtype: str) -> None:
    """The short convolution with its activation: few channels of one token to many of a prompt."""
    kernel = 4
    for tokens, channels in bench.plan.convolved:
        state = FixedState(
            (1,),
            (channels, kernel - 1),
            batch=1,
            dtype=TORCH_DTYPES[dtype],
            device=torch.get_default_device(),
        )
        # half of a projection, as in the mixers: its rows are further apart than they are long
        x = torch.rand(1, tokens, 2 * channels).to(TORCH_DTYPES[dtype])[..., :channels]
        weight = torch.rand(channels, 1, kernel).to(TORCH_DTYPES[dtype])
        bias = torch.rand(channels).to(TORCH_DTYPES[dtype])

        def convolve(
            x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias, state: FixedState = state
        ) -> Tensor:
            return silu(state.convolve(x, weight, bias))

        seconds, spread = bench.cold(convolve)
        where = point(dtype, 1, tokens)
        operation = convolution(where, channels=channels, kernel=kernel, prefill=True)
        add(bench.results, operation, seconds, spread, dtype=dtype)


def scans(bench: Bench, dtype: str) -> None:
    """Every recurrent mixer of the plan, over a prompt and in a step."""
    for mixer, tokens in _mixers(bench.plan):
        # RG-LRU layers are RecurrentGemma's, whose gate is a GELU
        numerics = Numerics(activation="gelu_tanh") if isinstance(mixer, RGLRU) else Numerics()
        runner = runner_of(mixer, numerics)
        assert isinstance(runner, RecurrentRunner)
        generator = torch.Generator(device=torch.get_default_device()).manual_seed(0)
        kind = TORCH_DTYPES[dtype]
        w = {
            name: random_tensor(shape, kind, generator)
            for name, shape in runner.shapes(_D_MODEL).items()
        }
        sizes = {(matrix.n_out, matrix.n_in) for matrix in mixer.linears(_D_MODEL)}
        w = {n: _Given(len(t), kind) if tuple(t.shape) in sizes else t for n, t in w.items()}
        if isinstance(runner, RGLRURunner):
            _gates(bench, dtype, runner, w, tokens)
        (cache,) = _caches(runner, kind, 1, 1)
        x = torch.rand(1, tokens, _D_MODEL).to(kind)
        whole = bench.cold(partial(_run, runner, w, cache, x, True))
        _rest(bench, dtype, mixer.prefill(point(dtype, 1, tokens)), whole)
        for batch in (1, _BATCH):
            x = torch.rand(batch, 1, _D_MODEL).to(kind)
            caches = _caches(runner, kind, batch, 2)
            step = bench.far(*(partial(_run, runner, w, c, x, False) for c in caches))
            _rest(bench, dtype, mixer.decode(point(dtype, batch, 1)), step)


class _Given:
    """A projection whose product is there already: ``linear`` with it takes no time to speak of."""

    def __init__(self, n_out: int, dtype: torch.dtype) -> None:
        self.n_out, self.dtype = n_out, dtype
        self._products: dict[torch.Size, Tensor] = {}

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Tensor:
        assert function is linear
        x, self = arguments[:2]
        return self.product(x.shape[:-1])

    def product(self, rows: torch.Size) -> Tensor:
        """The same for every ``x`` of so many rows."""
        if rows not in self._products:
            self._products[rows] = torch.randn(*rows, self.n_out).mul_(0.1).to(self.dtype)
        return self._products[rows]


def _caches(runner: RecurrentRunner, dtype: torch.dtype, batch: int, n: int) -> list[FixedState]:
    device = torch.get_default_device()
    return [runner.cache(batch=batch, dtype=dtype, device=device) for _ in range(n)]


def _mixers(plan: Plan) -> Iterator[tuple[AbstractMixer, int]]:
    """(mixer, prompt tokens); sizes as the plan says."""
    for heads, head_dim, d_state, chunk, tokens in plan.mamba2:
        mixer = Mamba2(
            n_heads=heads,
            head_dim=head_dim,
            d_state=d_state,
            n_groups=1,
            conv_kernel=4,
            chunk_tokens=chunk,
        )
        yield mixer, tokens
    for width, blocks, tokens in plan.rglru:
        yield RGLRU(width=width, n_blocks=blocks, conv_kernel=4), tokens
    for channels, d_state, tokens in plan.mamba:
        yield Mamba(d_inner=channels, d_state=d_state, dt_rank=32, conv_kernel=4), tokens
    for heads, form, tokens in plan.delta:
        delta = DeltaRule(
            form=form,
            n_key_heads=heads,
            n_value_heads=heads,
            key_dim=128,
            value_dim=128,
            conv_kernel=4,
        )
        yield delta, tokens
    for heads, tokens in plan.rwkv5:
        yield RWKV5(n_heads=heads, head_dim=64, shift_dim=_D_MODEL), tokens


def _run(runner: RecurrentRunner, w: Tensors, cache: Any, x: Tensor, first: bool) -> Tensor:
    if first:
        cache.clear()
    return runner.run(x, w, cache, None, first)


def _rest(bench: Bench, dtype: str, operations: Operations, whole: tuple[float, float]) -> None:
    """Take off what is known of the whole, and add the scan (the only one of its kind)."""
    scan = next(op for op in operations if op.kind in ("scan_prefill", "scan_step"))
    seconds, spread = whole
    known = sum(predicted_s(bench.results, op) for op in operations if op is not scan)
    rest = max(seconds - known, _LEAST_SHARE * seconds)
    add(bench.results, scan, rest, spread, dtype=dtype)


def _gates(bench: Bench, dtype: str, runner: RGLRURunner, w: Tensors, tokens: int) -> None:
    """Block-diagonal gates: few rows as a step has them, and a prompt."""
    for n in (1, tokens):
        x = torch.rand(1, n, runner.mixer.width).to(TORCH_DTYPES[dtype])
        seconds, spread = bench.cold(partial(runner.gates, x, w))
        operation = named(runner.mixer.prefill(point(dtype, 1, n)), "rglru_gates")
        add(bench.results, operation, seconds, spread, dtype=dtype)
