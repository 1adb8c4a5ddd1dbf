"""Which shapes and sizes a calibration measures: data, no code."""

from dataclasses import dataclass, replace
from typing import Literal


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
    windows         of windowed and banded prompts (of about twice as many tokens)
    scored_tokens   prompts whose scores are summed
    kept_tokens     tokens kept by a method that drops others
    step_groups     query heads per KV head of steps over kept tokens, and over unpacked copies
    method_tokens   tokens in the caches of the other methods
    selected_tokens scores per head that a top-k chooses from
    convolved       (tokens, channels) of short convolutions
    mamba2          (heads, head size, state size, chunk, prompt tokens); rglru  (width, blocks,
                    tokens); mamba  (channels, state size, tokens); delta  (heads, form, tokens);
                    rwkv5  (heads, tokens)
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
    windows: tuple[int, ...]
    scored_tokens: tuple[int, ...]
    kept_tokens: tuple[int, ...]
    step_groups: tuple[int, ...]
    method_tokens: tuple[int, ...]
    selected_tokens: tuple[int, ...]
    convolved: tuple[tuple[int, int], ...]
    mamba2: tuple[tuple[int, int, int, int, int], ...]
    rglru: tuple[tuple[int, int, int], ...]
    mamba: tuple[tuple[int, int, int], ...]
    delta: tuple[tuple[int, Literal["gdn", "kda"], int], ...]
    rwkv5: tuple[tuple[int, int], ...]
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
    max_call_s=0.02,
    head_dims=(64, 128),
    groups=(1, 4),
    decode_tokens=(200, 1600, 12800),
    prefill_tokens=(300, 1100, 4500),
    kivi_tokens=(400, 3200),
    quantise_tokens=(1600,),
    append_heads=(3, 48),
    layer_rows=(1, 16, 256, 4096),
    stream_bytes=(2**12, 2**16, 2**20, 2**23, 2**26, 2**28),
    windows=(400,),
    scored_tokens=(1100,),
    kept_tokens=(200, 1600),
    step_groups=(4,),
    method_tokens=(1600,),
    selected_tokens=(600, 9000),
    convolved=((1, 700), (1, 11000), (600, 2800)),
    mamba2=((26, 64, 128, 256, 256),),
    rglru=((1152, 6, 300),),
    mamba=((1152, 16, 256),),
    delta=((6, "gdn", 256),),
    rwkv5=((6, 256),),
)
FULL = Plan(
    seconds=0.05,
    pool_bytes=2**29,
    gemm_shapes=(
        *((704, 448), (1216, 832), (1088, 3008), (4928, 1088), (2944, 2944)),
        *((12032, 4160), (4160, 12032), (20032, 1344)),
    ),
    rows=(1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384),
    max_call_s=0.06,
    head_dims=(64, 128, 256),
    groups=(1, 2, 4, 8),
    decode_tokens=(100, 400, 1600, 12800, 51200),
    prefill_tokens=(150, 300, 600, 900, 1800, 3600),
    kivi_tokens=(400, 3200, 12800),
    quantise_tokens=(400, 3200, 12800),
    layer_rows=(1, 2, 4, 16, 64, 256, 1024, 4096, 16384),
    stream_bytes=tuple(2**n for n in range(12, 30, 2)),
    windows=(300, 1200),
    scored_tokens=(400, 1500),
    kept_tokens=(100, 800, 6400),
    step_groups=(2, 8),
    method_tokens=(600, 4800),
    selected_tokens=(300, 3000, 30000),
    convolved=((1, 700), (1, 2800), (1, 11000), (150, 700), (600, 2800), (2000, 5600)),
    mamba2=(
        *((7, 64, 128, 256, 512), (54, 64, 128, 256, 768), (14, 64, 128, 128, 512)),
        *((14, 64, 64, 256, 512), (14, 128, 128, 256, 512)),
    ),
    rglru=((384, 3, 300), (1152, 6, 600), (4608, 18, 600)),
    mamba=((576, 16, 256), (2304, 16, 256)),
    delta=((6, "gdn", 256), (18, "gdn", 512), (6, "kda", 256)),
    rwkv5=((6, 256), (24, 512)),
)
#: A GPU starts no call faster than in some microseconds and needs large ones to be busy. Not run
#: yet: no GPU was at hand.
GPU = replace(
    FULL,
    seconds=0.02,
    pool_bytes=2**32,
    max_call_s=0.02,
    dtypes=("bf16",),
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384),
    decode_tokens=(400, 3200, 25600, 204800),
    prefill_tokens=(300, 1100, 4500, 18000),
    kv_heads=6,
    head_dims=(64, 128),
)
GPU_QUICK = replace(
    GPU,
    gemm_shapes=QUICK.gemm_shapes,
    rows=(1, 4, 16, 64, 256, 1024, 4096),
    decode_tokens=(1600, 25600),
    prefill_tokens=(1100, 9000),
    groups=(1, 4),
)
