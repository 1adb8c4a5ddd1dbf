"""Which of transformers' cache classes realises which method.

``reference`` is what most people run: ``DynamicCache`` (a new, longer tensor every step);
``best`` is the preallocated ``StaticCache``. The quantised caches have one form.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, QuantizedCache, StaticCache

from costmodel.errors import MissingExtraError, NotApplicableError
from costmodel.methods.base import AbstractMethod
from measure.points import MeasurePoint
from measure.runnable import missing_package, refusal

Maker = Callable[[MeasurePoint, AbstractMethod, Any, torch.device], Any]


def _plain(point: MeasurePoint, _: AbstractMethod, config: Any, device: torch.device) -> Any:
    if point.realisation == "best":
        room = point.context_tokens + point.output_tokens
        try:
            return StaticCache(config=config, max_cache_len=room)
        except KeyError as error:  # a kind of layer it has no class for
            raise NotApplicableError(
                f"transformers has no static cache for layers of {error.args[0]}"
            ) from None
    return DynamicCache(config=config)


def _offloaded(point: MeasurePoint, _: AbstractMethod, config: Any, device: torch.device) -> Any:
    return DynamicCache(config=config, offloading=True)


def _quantised(backend: str, axis: int) -> Maker:
    def make(point: MeasurePoint, method: Any, config: Any, device: torch.device) -> Any:
        lacking = missing_package(point.stack, engine="transformers")
        if lacking:
            raise MissingExtraError(lacking)
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


#: Families whose models refuse the caches that all others take.
OWN_CACHES = frozenset({"minimax"})
#: Method -> what makes its cache. Axes are the classes' own defaults.
MAKERS: Mapping[str, Maker] = {
    "full": _plain,
    "kv_offload": _offloaded,
    "hf_quanto": _quantised("quanto", 0),
    "hf_hqq": _quantised("hqq", 0),
}


def make_cache(point: MeasurePoint, config: Any, device: torch.device) -> Any:
    """Return an empty cache of the point's method; raises ``NotApplicableError`` where
    transformers has none.
    """
    reason = refusal(point.stack, engine="transformers", device=device.type)
    if reason:
        raise NotApplicableError(reason)
    if config.model_type in OWN_CACHES:
        raise NotApplicableError(
            f"{config.model_type}: transformers runs this family with a cache class of its own only"
        )
    method = point.stack.methods[0]
    return MAKERS[method.NAME](point, method, config, device)
