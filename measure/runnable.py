"""What can be run at all, told before any process starts; importing this loads no torch."""

import functools
import importlib.util
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from costmodel.methods.stack import MethodStack

#: Modules beside the twins of methods.
_NOT_METHODS = (
    *("base", "buffers", "eager", "evicting", "host_copies", "kept_tokens", "packing"),
    "token_packed",
)
#: Methods that transformers has a cache class for -> (module its cache needs, how to get it).
TRANSFORMERS_CACHES: Mapping[str, tuple[str, str] | None] = {
    "full": None,
    "kv_offload": None,
    "hf_quanto": ("optimum.quanto", "optimum-quanto"),
    "hf_hqq": ("hqq", "hqq"),
}


@functools.cache
def runnable_names() -> tuple[str, ...]:
    """Names of the methods that have a twin in ``measure.methods`` (nothing is imported)."""
    folder = str(Path(__file__).parent / "methods")
    return tuple(
        sorted(m.name for m in pkgutil.iter_modules([folder]) if m.name not in _NOT_METHODS)
    )


def refusal(stack: MethodStack, *, engine: str, device: str) -> str:
    """Say why nothing runs ``stack`` on an engine; empty: something does."""
    names = [m.NAME for m in stack.methods]
    if engine == "transformers":
        if len(names) != 1 or names[0] not in TRANSFORMERS_CACHES:
            known = ", ".join(sorted(TRANSFORMERS_CACHES))
            return f"{stack.spec}: transformers has caches for {known}"
        if names == ["kv_offload"] and not device.startswith("cuda"):
            return "transformers offloads its cache from a CUDA device only"
        return ""
    for name in names:
        if name not in runnable_names():
            known = ", ".join(runnable_names())
            return f"{name} is priced but cannot be run here; runnable: {known}"
    return ""


def missing_package(stack: MethodStack, *, engine: str) -> str:
    """Say which package ``stack`` lacks on an engine; empty: none."""
    if engine != "transformers":
        return ""
    for method in stack.methods:
        needed = TRANSFORMERS_CACHES.get(method.NAME)
        if needed is not None and not installed(needed[0]):
            return f"{method.NAME} needs {needed[1]}: pip install {needed[1]}"
    return ""


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it or its parents' contents."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
