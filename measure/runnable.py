"""What can be run at all, told before any process starts; importing this loads no torch."""

import functools
import importlib.util
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from costmodel.methods.stack import MethodStack

#: Modules beside the twins of methods.
_NOT_METHODS = (
    *("base", "buffers", "eager", "evicting", "fixed_steps", "host_copies", "infllm_blocks"),
    *("infllm_published", "kept_tokens", "llmlingua_package", "packing", "token_packed"),
    "two_stages",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheNeeds:
    """What a cache class of transformers needs: a module, the package that has it, a GPU."""

    module: str = ""
    package: str = ""
    on_cuda_only: bool = False


#: Methods that transformers has a cache class for.
TRANSFORMERS_CACHES: Mapping[str, CacheNeeds] = {
    "full": CacheNeeds(),
    "kv_offload": CacheNeeds(on_cuda_only=True),
    "hf_quanto": CacheNeeds(module="optimum.quanto", package="optimum-quanto"),
    "hf_hqq": CacheNeeds(module="hqq", package="hqq"),
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
        if TRANSFORMERS_CACHES[names[0]].on_cuda_only and not device.startswith("cuda"):
            return f"{stack.spec}: transformers has this cache on a CUDA device only"
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
        if needed is not None and needed.module and not installed(needed.module):
            return f"{method.NAME} needs {needed.package}: pip install {needed.package}"
    return ""


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it or its parents' contents."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False
