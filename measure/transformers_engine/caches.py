"""Which of transformers' cache classes realises which method.

``reference`` is what most people run: ``DynamicCache`` (a new, longer tensor every step);
``best`` is the preallocated ``StaticCache``. The quantised caches have one form.
"""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

from costmodel.errors import MissingExtraError, NotApplicableError
from costmodel.methods.base import AbstractMethod
from measure.points import MeasurePoint

Maker = Callable[[MeasurePoint, AbstractMethod, Any, torch.device], Any]


def _plain(point: MeasurePoint, _: AbstractMethod, config: Any, device: torch.device) -> Any:
    if point.realisation == "best":
        room = point.context_tokens + point.output_tokens
        return StaticCache(config=config, max_cache_len=room)
    return DynamicCache(config=config)


def _offloaded(point: MeasurePoint, _: AbstractMethod, config: Any, device: torch.device) -> Any:
    if device.type != "cuda":
        raise NotApplicableError("transformers offloads its cache from a CUDA device only")
    return DynamicCache(config=config, offloading=True)


def _quantised(backend: str, package: str, install: str, axis: int) -> Maker:
    def make(point: MeasurePoint, method: Any, config: Any, device: torch.device) -> Any:
        if not _installed(package):
            raise MissingExtraError(f"this cache needs {install}: pip install {install}")
        return QuantizedCache(
            backend=backend,
            config=config,
            nbits=method.bits,
            axis_key=axis,
            axis_value=axis,
            q_group_size=method.group,
            residual_length=method.residual_tokens,
        )

    return make


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


#: Method -> what makes its cache. Axes are the classes' own defaults.
MAKERS: Mapping[str, Maker] = {
    "full": _plain,
    "kv_offload": _offloaded,
    "hf_quanto": _quantised("quanto", "optimum.quanto", "optimum-quanto", 0),
    "hf_hqq": _quantised("hqq", "hqq", "hqq", 0),
}


def make_cache(point: MeasurePoint, config: Any, device: torch.device) -> Any:
    """Return an empty cache of the point's method; raises ``NotApplicableError`` where
    transformers has none.
    """
    names = [m.NAME for m in point.stack.methods]
    if len(names) != 1 or names[0] not in MAKERS:
        raise NotApplicableError(
            f"{point.stack.spec}: transformers has caches for {', '.join(sorted(MAKERS))}"
        )
    return MAKERS[names[0]](point, point.stack.methods[0], config, device)
