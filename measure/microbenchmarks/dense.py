"""Matmuls with cold weights, what runs between them, plain copies, and the cost of starting one."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from costmodel.kernels.curves import curve_name
from measure.engine import TORCH_DTYPES
from measure.microbenchmarks.bench import Bench, CurvePoint
from measure.numerics import Rope
from measure.parts import rms, rope_table, rotate

#: Copies of at most this size reuse their buffers, as activations are reused.
_REUSED_BYTES = 2**23
#: Products with the first weights of a shape, before any is timed: the very first took several
#: times as long as the tenth.
_UNTIMED = 8
#: One copy over the host link.
_LINK_BYTES = 2**28


def stream(bench: Bench) -> None:
    """Copy by working set (half read, half written); sum cold memory; start a tiny operation."""
    points = []
    for n_bytes in bench.plan.stream_bytes:
        elements = n_bytes // 8
        target = torch.empty(elements)
        if n_bytes <= _REUSED_BYTES:
            call = partial(target.copy_, torch.ones(elements))
        else:
            call = partial(_copy_next, target, bench.rotating("fp32", elements))
        seconds, spread = bench.hot(call)
        points.append((float(n_bytes), seconds / n_bytes, spread))
    bench.results.add(curve_name("stream"), points)
    elements = bench.plan.pool_bytes // 32  # an eighth of the pool at a time
    buffers = bench.rotating("fp32", elements)
    seconds, _ = bench.hot(lambda: next(buffers).sum())
    bench.results.saw_cold_bytes(4 * elements / seconds)
    seconds, spread = bench.hot(partial(torch.ones(64).add, 1.0))
    bench.results.add(curve_name("dispatch"), [(1.0, seconds, spread)])


def host_link(bench: Bench) -> None:
    """From pinned host memory to the device, one direction, large enough for latency not to count.

    Written from PyTorch's documentation; no such device was at hand.
    """
    there = torch.empty(_LINK_BYTES, dtype=torch.uint8)
    here = torch.empty(_LINK_BYTES, dtype=torch.uint8, device="cpu", pin_memory=True)
    seconds, _ = bench.hot(partial(there.copy_, here, non_blocking=True))
    bench.results.host_link_bytes_per_s = _LINK_BYTES / seconds


def gemm(bench: Bench, dtype: str) -> None:
    """Activations times rotating weights, over rows."""
    kind = TORCH_DTYPES[dtype]
    for n, k in bench.plan.gemm_shapes:
        if not bench.fits(dtype, n * k):
            continue
        weights = bench.rotating(dtype, n, k)
        x = torch.full((1, k), 0.1, dtype=kind)
        for _ in range(_UNTIMED):
            _linear_next(x, weights)
        points: list[CurvePoint] = []
        for m in bench.plan.rows:
            flops = 2.0 * m * n * k
            # few rows say nothing about many: what a call takes at least decides, at the best rate
            if flops / bench.results.flops_per_s.get(dtype, 1e12) > bench.plan.max_call_s:
                break
            x = torch.full((m, k), 0.1, dtype=kind)
            seconds, spread = bench.streaming(partial(_linear_next, x, weights))
            points.append((float(m), seconds / flops, spread))
            bench.results.saw_flops(dtype, flops / seconds)
            if m == 1:
                bench.results.saw_cold_bytes(n * k * kind.itemsize / seconds)
        bench.results.add(curve_name("gemm", dtype, n=n, k=k), points)


def elementwise(bench: Bench, dtype: str) -> None:
    """Norms, rotary embedding, activation and residual sums of one layer of the engine.

    Seconds per byte as the cost model counts them: 8 d + 3 F elements per token of a layer with
    attention and an MLP (two blocks), 4 d where a layer is one recurrent mixer (one block); with
    SiLU, and with the tanh-GELU of Gemma's kin, which takes several times as long. What
    runs between two matmuls is timed alone: every matmul drives the code of the next few small
    operations out of the core's cache. Timed as one call a layer of one token took a third.
    """
    d, f = bench.plan.layer[:2]
    kind = TORCH_DTYPES[dtype]
    for rows in bench.plan.layer_rows:
        between = _Between(bench.plan.layer, rows, kind)
        block, spread = bench.cold(between.sum_and_norm)
        shared = 2 * block + sum(bench.cold(part)[0] for part in (between.turn, between.join))
        for suffix, activation in (("", silu), ("_gelu", partial(gelu, approximate="tanh"))):
            layer = shared + bench.cold(partial(between.activate, activation))[0]
            for blocks, elements, seconds in ((1, 4.0 * d, block), (2, 8.0 * d + 3.0 * f, layer)):
                n_bytes = rows * elements * kind.itemsize
                name = curve_name(f"norm_rope_activation{suffix}", dtype, blocks=blocks)
                bench.results.add_point(name, (n_bytes, seconds / n_bytes, spread))


class _Between:
    """What the engine runs in a layer but matmuls and mixing, on reused activations."""

    def __init__(
        self, layer: tuple[int, int, int, int, int], rows: int, dtype: torch.dtype
    ) -> None:
        d, f, n_heads, n_kv_heads, size = layer

        def activation(*shape: int) -> Tensor:
            return torch.full(shape, 0.1, dtype=dtype)

        self.n_heads, self.n_kv_heads, self.size = n_heads, n_kv_heads, size
        self.weight = activation(d)
        self.x = activation(1, rows, d)
        self.qkv = activation(1, rows, (n_heads + 2 * n_kv_heads) * size)
        self.attended = activation(1, n_heads, rows, size)
        self.gate_up = activation(1, rows, 2 * f)
        self.table = rope_table(rows, size, Rope(), dtype, torch.get_default_device())

    def sum_and_norm(self) -> Tensor:
        """Before every block."""
        return rms(self.x + self.x, self.weight, 1e-5)

    def turn(self) -> tuple[Tensor, Tensor]:
        """Between the projection and attention."""
        heads = self.qkv.view(1, self.qkv.shape[1], -1, self.size).transpose(1, 2)
        parts = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        q, k, _ = heads.split(parts, dim=1)
        return rotate(q, self.table), rotate(k, self.table)

    def join(self) -> Tensor:
        """Before the output projection."""
        return self.attended.transpose(1, 2).flatten(2)

    def activate(self, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Between the matmuls of a gated MLP."""
        gate, up = self.gate_up.chunk(2, dim=-1)
        return activation(gate) * up


def _copy_next(target: Tensor, buffers: Iterator[Tensor]) -> None:
    target.copy_(next(buffers))


def _linear_next(x: Tensor, weights: Iterator[Tensor]) -> None:
    linear(x, next(weights))
