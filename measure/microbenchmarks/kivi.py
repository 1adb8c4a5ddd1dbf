"""The parts of a quantised (KIVI) cache on the torch engine, run by its own twin.

Unpacking is timed alone; what is left of a step's attention is attention over the unpacked copy, so
the two add up to what a step really takes at the sizes measured.
"""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from costmodel.kernels.curves import curve_name
from costmodel.methods.kivi import Kivi
from costmodel.mixers import Attention
from measure.engine import TORCH_DTYPES
from measure.methods.kivi import KiviCache
from measure.microbenchmarks.bench import Bench, CurvePoint

#: Caches to rotate through, so that packed data has left the core's own cache.
_ROTATION = 2


def quantised_cache(bench: Bench, dtype: str) -> None:
    """All curves of quantised caches for one compute type."""
    plan = bench.plan
    size = plan.head_dims[0]
    for bits in plan.bits:
        add = partial(curve_name, dtype=dtype, bits=bits)
        points = [_unpacking(bench, dtype, bits, size, n) for n in plan.kivi_tokens]
        bench.results.add(add("dequantise"), points)
        bench.results.add(
            add("quantise_append"),
            [_append(bench, dtype, bits, size, heads) for heads in plan.append_heads],
        )
        points = [_store(bench, dtype, bits, size, n) for n in plan.quantise_tokens]
        bench.results.add(add("quantise"), points)
    for size, tokens in itertools.product(plan.head_dims, plan.kivi_tokens):
        _attention(bench, dtype, plan.bits[0], size, tokens)


def _cache(dtype: str, bits: int, size: int, tokens: int, heads: int) -> KiviCache:
    mixer = Attention(n_heads=heads, n_kv_heads=heads, head_dim=size, v_head_dim=size)
    return KiviCache(
        Kivi(bits=bits),
        mixer,
        batch=1,
        dtype=TORCH_DTYPES[dtype],
        device=torch.get_default_device(),
        reserve_tokens=tokens + 1,
    )


def _filled(bench: Bench, dtype: str, bits: int, size: int, tokens: int) -> Iterator[KiviCache]:
    heads = bench.plan.kv_heads
    caches = [_cache(dtype, bits, size, tokens, heads) for _ in range(_ROTATION)]
    for seed, cache in enumerate(caches):
        cache.fill(tokens, seed)
    return itertools.cycle(caches)


def _unpacking(bench: Bench, dtype: str, bits: int, size: int, tokens: int) -> CurvePoint:
    """Unpack everything that is packed; x is the elements packed."""
    caches = _filled(bench, dtype, bits, size, tokens)
    cache = next(caches)
    elements = _packed_elements(cache)
    seconds, spread = bench.cold(lambda: _unpack(next(caches)))
    return elements, seconds / elements, spread


def _attention(bench: Bench, dtype: str, bits: int, size: int, tokens: int) -> None:
    """Attention of a step less the unpacking; x is all K and V elements."""
    caches = _filled(bench, dtype, bits, size, tokens)
    cache = next(caches)
    heads = cache.mixer.n_kv_heads
    elements = 2.0 * heads * size * tokens
    unpack_s, _ = bench.cold(lambda: _unpack(next(caches)))
    for group in bench.plan.step_groups:
        q = torch.full((1, heads * group, 1, size), 0.1, dtype=cache.dtype)
        step_s, spread = bench.cold(partial(_attend_next, caches, q))
        # Never below a twentieth: on a disturbed machine the difference could even be negative.
        rest = max(step_s - unpack_s, 0.05 * step_s)
        name = curve_name("dequantised_attention", dtype, head_dim=size, group=group)
        bench.results.add_point(name, (elements, rest / elements, spread))


def _unpack(cache: KiviCache) -> None:
    for start, stop in cache.key_pieces():
        cache.dequantised_keys(start, stop)
    for start, stop in cache.value_pieces():
        cache.dequantised_values(start, stop)


def _attend_next(caches: Iterator[KiviCache], q: Tensor) -> None:
    """Attention of a step; the cache is left as it was."""
    cache = next(caches)
    k = q[:, : cache.mixer.n_kv_heads]
    cache.recent_keys.append(k)
    cache.attend_packed(cache.fold(q), k)
    cache.recent_keys.length -= 1


def _append(bench: Bench, dtype: str, bits: int, size: int, heads: int) -> CurvePoint:
    """One value quantised per step, and a block of R keys every R steps; x is K and V elements."""
    cache = _cache(dtype, bits, size, 512, heads)
    cache.fill(512)
    v = torch.full((1, heads, 1, size), 0.1, dtype=cache.dtype)
    block = torch.full((1, heads, cache.residual, size), 0.1, dtype=cache.dtype)

    def value() -> None:
        cache.replace_oldest_value(v)
        cache.values.truncate(cache.values.length - 1)

    def keys() -> None:
        cache.recent_keys.clear()
        cache.recent_keys.append(block)
        cache.pack_full_block()
        cache.keys.truncate(cache.keys.length - 1)

    value_s, spread = bench.cold(value)
    keys_s, _ = bench.cold(keys)
    elements = 2.0 * heads * size
    return elements, (value_s + keys_s / cache.residual) / elements, spread


def _store(bench: Bench, dtype: str, bits: int, size: int, tokens: int) -> CurvePoint:
    """Quantise and pack a prompt; x is the elements packed."""
    heads = bench.plan.kv_heads
    cache = _cache(dtype, bits, size, tokens, heads)
    k = torch.rand(1, heads, tokens, size).to(cache.dtype)

    def store() -> None:
        cache.clear()
        cache.store(k, k)

    seconds, spread = bench.cold(store)
    elements = _packed_elements(cache)
    return elements, seconds / elements, spread


def _packed_elements(cache: KiviCache) -> float:
    packed_tokens = cache.keys.length * cache.residual + cache.values.length
    return float(cache.mixer.n_kv_heads * cache.mixer.head_dim * packed_tokens)
