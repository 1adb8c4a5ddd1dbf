"""What a paged decode kernel that unpacks 4 bits would take on an RTX A6000, by counts.

    python benchmarks/paged_cache_counts.py

The form of LLMkvsys/rethink-kv-compression's ``pagedattention_quant_full.py`` (at 5e99f0a), written
anew: a program per KV head, quarter of a sequence and sequence; pages of 64 tokens; codes widened,
scaled by one scale and zero a token and head, and put through a tensor-core product of 16 rows, of
which one is a query. Compiled for compute capability 8.6 with the warps its autotuner tries; no GPU
is needed. Per page and multiprocessor it prints

    issue    instructions of the loop of all warps / 4 schedulers
    memory   bytes of the page at the datasheet's bandwidth, shared by all multiprocessors
    waits    cycles that the programs resident on a multiprocessor may each wait per page before
             waiting, not memory at 16 bits, decides

Resident programs: by registers, by 100 KiB of shared memory (1 KiB reserved a program), by 48
warps. The published unpacking returns a constant, so the compiler drops the loads of codes; both
that form and one that unpacks are compiled.
"""

import triton
import triton.language as tl

from costmodel.hardware import load_hardware
from measure.kernels._compile import CompileCase, Resources, compile_case, typed

HEADS, HEAD_DIM, PAGE_TOKENS, SPLITS = 32, 128, 64, 4
SCHEDULERS, SHARED_BYTES, WARPS = 4, 100 * 1024, 48
#: form -> (packed, unpacks, bytes read per page of keys and values)
ELEMENTS = 2 * PAGE_TOKENS * HEAD_DIM
SCALES_BYTES = 2 * PAGE_TOKENS * 4
FORMS = {
    "16 bits": (False, False, 2 * ELEMENTS),
    "4 bits, unpacking a constant": (True, False, SCALES_BYTES),
    "4 bits, unpacking": (True, True, ELEMENTS // 2 + SCALES_BYTES),
}


@triton.jit
def paged_decode(
    queries, keys, values, key_scales, value_scales, lengths, pages, out, page_stride, scale,
    PACKED: tl.constexpr, UNPACKS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    head, part, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, d, n = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, N)
    is_query = rows < 1
    first = (sequence * HEADS + head) * D
    q = tl.load(queries + first + rows[:, None] * D + d[None, :], mask=is_query[:, None], other=0.0)
    length = tl.load(lengths + sequence)
    each = tl.cdiv(tl.cdiv(length, N), SPLITS) * N
    start = each * part
    stop = tl.minimum(start + each, length)
    largest = tl.full([16], float("-inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    sums = tl.zeros([16, D], tl.float32)
    WIDTH: tl.constexpr = D // 2 if PACKED else D
    w = tl.arange(0, WIDTH)
    for at in range(start, stop, N):
        page = tl.load(pages + sequence * page_stride + at // N)
        base = page * (N * HEADS * WIDTH) + head * WIDTH
        k = tl.load(keys + base + n[None, :] * (HEADS * WIDTH) + w[:, None])
        v = tl.load(values + base + n[:, None] * (HEADS * WIDTH) + w[None, :])
        if PACKED:
            pair = page * (N * HEADS * 2) + n * (HEADS * 2) + head * 2
            k_scale, k_zero = tl.load(key_scales + pair), tl.load(key_scales + pair + 1)
            v_scale, v_zero = tl.load(value_scales + pair), tl.load(value_scales + pair + 1)
            if UNPACKS:
                k = tl.reshape(tl.permute(tl.join(k & 15, k >> 4), (2, 0, 1)), (D, N))
                v = tl.reshape(tl.permute(tl.join(v & 15, v >> 4), (0, 2, 1)), (N, D))
            else:
                k, v = tl.full((D, N), 3, tl.uint8), tl.full((N, D), 1, tl.uint8)
            k = ((k - k_zero[None, :]) * k_scale[None, :]).to(tl.float16)
            v = ((v - v_zero[:, None]) * v_scale[:, None]).to(tl.float16)
        scores = tl.dot(q, k) * scale
        if at + N > length - 1:
            scores = tl.where((length - 1 >= at + n)[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        shrunk = tl.exp(largest - new)
        total = shrunk * total + tl.sum(weights, 1)
        sums = sums * shrunk[:, None] + tl.dot(weights.to(tl.float16), v)
        largest = new
    row = ((sequence * HEADS + head) * SPLITS + part) * (D + 2)
    tl.store(out + row + d[None, :] + rows[:, None], sums, mask=is_query[:, None])
    tl.store(out + row + D + rows, largest, mask=is_query)
    tl.store(out + row + D + 1 + rows, total, mask=is_query)


def counted(packed: bool, unpacks: bool, num_warps: int) -> Resources:
    codes = "keys values" if packed else ""
    halves = "queries key_scales value_scales" + ("" if packed else " keys values")
    names = {
        "*fp16": halves,
        "*u8": codes,
        "*i64": "lengths pages",
        "*fp32": "out",
        "i32": "page_stride",
        "fp32": "scale",
    }
    shape = {"HEADS": HEADS, "D": HEAD_DIM, "N": PAGE_TOKENS, "SPLITS": SPLITS}
    case = CompileCase(
        name="paged_decode",
        kernel=paged_decode,
        signature=typed(names),
        constants={"PACKED": packed, "UNPACKS": unpacks, **shape},
        num_warps=num_warps,
        num_stages=2,
    )
    return compile_case(case, 86).resources


def main() -> None:
    device = load_hardware("rtx-a6000")
    units, clock = device.n_units or 0, device.clock_hz or 0.0
    share = device.hbm_bytes_per_s / units / clock  # bytes per cycle of one multiprocessor
    print("| form | warps | resident programs | issue | memory | waits |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, (packed, unpacks, n_bytes) in FORMS.items():
        for num_warps in (4, 8, 16):
            used = counted(packed, unpacks, num_warps)
            shared = SHARED_BYTES // (used.shared_bytes + 1024)
            resident = min(used.resident_blocks, shared, WARPS // num_warps)
            issue = used.loop_instructions * num_warps / SCHEDULERS
            waits = resident * 2 * ELEMENTS / share
            print(
                f"| {name} | {num_warps} | {resident} | {issue:,.0f} "
                f"| {n_bytes / share:,.0f} | {waits:,.0f} |"
            )


if __name__ == "__main__":
    main()
