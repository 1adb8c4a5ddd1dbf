"""Fused Triton kernels for what methods do in a decode step, one file each.

A kernel's file holds, in this order: what it computes and the bytes it moves, derived on paper; an
obvious torch reference; the Triton kernel; the call that launches it; the shapes whose compilation
is tested (``COMPILE_CASES``). Files that start with an underscore hold what several share.

Nothing here is imported before it is asked for, so that everything else runs without Triton. With
``TRITON_INTERPRET=1``, set before the first import, the kernels run on a CPU, slowly: that is for
tests. Arithmetic in bfloat16 is wrong there (Triton 3.6 to 3.9), so kernels widen right after the
load where it counts.
"""

import functools
import importlib.util
import os
import pkgutil
from typing import TYPE_CHECKING

from costmodel.errors import MissingExtraError

if TYPE_CHECKING:
    import torch

# Triton 3.9 warns where this is unset, and 3.10 will stop fusing a * b + c, which the kernels count
# on. Read at every compilation.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

__all__ = ["check_usable", "interpreted", "kernel_names", "usable", "why_not"]


@functools.cache
def kernel_names() -> tuple[str, ...]:
    """Names of the kernel files (nothing is imported)."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name[0] != "_"))


def interpreted() -> bool:
    """Whether Triton kernels are interpreted in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(device: "torch.device | str") -> str | None:
    """Say why the kernels cannot run on ``device`` (or its name); None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "the fused kernels need Triton (package triton, Linux x86-64)"
    kind = str(device).partition(":")[0]
    if interpreted() or kind == "cuda":
        return None
    return f"the fused kernels run on a CUDA device, got {kind}"


def usable(device: "torch.device") -> bool:
    """Whether the kernels run on ``device``."""
    return why_not(device) is None


def check_usable(device: "torch.device | str") -> None:
    """Raise ``MissingExtraError`` with the reason where the kernels cannot run."""
    reason = why_not(device)
    if reason is not None:
        raise MissingExtraError(f"--engine lccost: {reason}; --engine torch runs without them")
