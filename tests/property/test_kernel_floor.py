"""No cold kernel is faster than its device: every family that ships, on every GPU, any shape."""

import numpy as np
import pytest

from costmodel.hardware import gpu_names, load_hardware
from costmodel.kernels.families import shipped_families
from costmodel.kernels.kinds import kind_names

GPUS = [h for h in map(load_hardware, gpu_names()) if not h.is_cpu and h.n_units]
#: How far outside the rows of a family shapes are drawn.
REACH = 8.0
N_SHAPES = 64


def shapes(ranges: dict[str, tuple[float, float]], seed: int) -> dict[str, np.ndarray]:
    """Whole numbers, log-uniform, up to ``REACH`` times outside the ranges; flags as they are."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, (least, most) in sorted(ranges.items()):
        is_flag = least in (0.0, 1.0) and most in (0.0, 1.0)
        if is_flag or name in ("element_bytes", "weight_bytes", "skew"):
            out[name] = rng.choice([least, most], N_SHAPES)
        else:
            low, high = np.log(max(least, 1.0) / REACH), np.log(max(most, 1.0) * REACH)
            out[name] = np.maximum(np.round(np.exp(rng.uniform(low, high, N_SHAPES))), 1.0)
    for part, whole in (("n_kv_heads", "n_heads"), ("local_experts", "n_experts")):
        if part in out:  # heads come in groups, experts on whole GPUs
            out[whole] = out[part] * np.maximum(np.round(out[whole] / out[part]), 1.0)
    if "top_k" in out:
        out["top_k"] = np.minimum(out["top_k"], out["n_experts"])
    if "window" in out:
        out["window"] = np.where(rng.random(N_SHAPES) < 0.5, 0.0, out["window"])
    return out


@pytest.mark.parametrize("kind", kind_names())
def test_a_cold_kernel_is_not_faster_than_its_device(kind: str) -> None:
    for i, family in enumerate(shipped_families(kind)):
        shape = shapes(dict(family.ranges), i)
        for gpu in GPUS:
            low, mid, high = family.time_s(gpu, shape)
            roofline = family.kind.roofline_s(gpu, shape, family.variant)
            where = (family.hardware, family.engine, family.kernel, gpu.name)
            assert np.all(np.isfinite(high)), where
            assert np.all(low <= mid), where
            assert np.all(mid <= high), where
            assert np.all(low >= roofline * (1 - 1e-9)), where
