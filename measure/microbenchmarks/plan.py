"""Which shapes and sizes a calibration measures: data, no code."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of a calibration, and how long each entry may take.

    seconds         of sampling for one entry
    pool_bytes      memory that rotating buffers are taken from
    gemm_shapes     (n, k) of y [m, n] = x [m, k] W^T; those of one to a few megabytes matter most,
                    because real layers have them
    rows            m
    max_call_s      products that would take longer are left out (their rate has settled before)
    head_dims, groups, kv_heads   of attention; group is query heads per KV head
    append_heads    sequences times KV heads of which a step quantises one token
    *_tokens        cached or prompt tokens
    bits            of quantised caches
    layer           (d, F, N, K, H) of the layer whose elementwise work is timed
    layer_rows      tokens of it
    stream_bytes    working sets of a copy
    """

    seconds: float
    pool_bytes: int
    gemm_shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    max_call_s: float
    head_dims: tuple[int, ...]
    groups: tuple[int, ...]
    decode_tokens: tuple[int, ...]
    prefill_tokens: tuple[int, ...]
    kivi_tokens: tuple[int, ...]
    quantise_tokens: tuple[int, ...]
    layer_rows: tuple[int, ...]
    stream_bytes: tuple[int, ...]
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    layer: tuple[int, int, int, int, int] = (576, 1600, 9, 3, 64)
    bits: tuple[int, ...] = (2, 4)
    kv_heads: int = 3
    append_heads: tuple[int, ...] = (1, 3, 48, 192)


QUICK = Plan(
    seconds=0.03,
    pool_bytes=2**29,
    gemm_shapes=((1216, 832), (1088, 3008), (4928, 1088), (20032, 1344), (12032, 4160)),
    rows=(1, 2, 4, 16, 64, 256, 1024, 4096),
    max_call_s=0.05,
    head_dims=(64, 128),
    groups=(1, 4),
    decode_tokens=(200, 1600, 12800),
    prefill_tokens=(300, 1100, 4500),
    kivi_tokens=(400, 1600, 9600),
    quantise_tokens=(400, 6400),
    layer_rows=(1, 8, 64, 512, 4096, 12288),
    stream_bytes=(2**12, 2**16, 2**20, 2**23, 2**26, 2**28),
)
FULL = Plan(
    seconds=0.15,
    pool_bytes=2**30,
    gemm_shapes=(
        *((704, 448), (1216, 832), (832, 1216), (1088, 3008), (4928, 1088), (2944, 2944)),
        *((12032, 4160), (4160, 12032), (20032, 1344), (100032, 2112)),
    ),
    rows=(1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    max_call_s=0.25,
    head_dims=(64, 128, 256),
    groups=(1, 2, 4, 8),
    decode_tokens=(100, 400, 1600, 6400, 25600, 102400),
    prefill_tokens=(150, 300, 600, 900, 1500, 2700, 5400),
    kivi_tokens=(400, 1600, 6400, 25600),
    quantise_tokens=(400, 1600, 6400, 25600),
    layer_rows=(1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384, 65536),
    stream_bytes=tuple(2**n for n in range(12, 30, 2)),
)
