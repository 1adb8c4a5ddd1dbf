"""KV offload: the cache lives in host memory and passes through the GPU layer by layer.

transformers' offloaded cache, FlexGen, ZeRO-Inference. ``resident_layers`` slots on the GPU hold
the layer in use and those being fetched; every decode step brings every layer over the host link.

Bytes, n cache-keeping layers, r resident:
    GPU   layers 0..r-1 (what the slots hold between two steps)
    host  ``ideal`` all layers, so that only the new token has to go back;
          ``reference`` the other n - r: a layer is in one place at a time, and goes back whole
Link of a step, per layer: its cache to the GPU, and the new token (``ideal``) or the whole layer
(``reference``) back. With r >= n nothing is offloaded.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.methods.base import (
    AbstractMethod,
    Mask,
    Scope,
    Stage,
    State,
    check_at_least,
)
from costmodel.methods.chains import elementwise, host_link
from costmodel.operation import Array, Operations
from costmodel.workload import Point

_LAYER = "transformers 5.23 cache_utils.py CacheLayerMixin"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KvOffload(AbstractMethod):
    """The whole cache in host memory."""

    NAME: ClassVar[str] = "kv_offload"
    TITLE: ClassVar[str] = "KV offload: the cache in host memory, fetched layer by layer"
    REFERENCE: ClassVar[str] = "transformers offloaded cache; Sheng et al., arXiv 2303.06865"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"store"})
    ACTS: ClassVar[str] = "after prefill, layer by layer, and on every decoded token"
    SCOPE: ClassVar[Scope] = "cache"
    DOES_NOT_SAVE: ClassVar[str] = (
        "time: every decode step moves the whole cache over the host link, slower wherever "
        "the cache would have fit."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = (
        "transformers (pageable, whole layers both ways)",
        "FlexLLMGen",
        "DeepSpeed ZeRO-Inference",
    )
    PARAMETERS: ClassVar[dict[str, str]] = {
        "resident_layers": "layers on the GPU at a time; fewer is smaller, 2 overlap transfers",
        "pinned": "host memory is page-locked: faster transfers, no effect on size",
    }
    STATE_FORMULA: ClassVar[str] = "GPU: min(r, n) layers; host: the layers of the model"

    resident_layers: int = 2
    pinned: bool = True

    def __post_init__(self) -> None:
        check_at_least("kv_offload", 1, resident_layers=self.resident_layers)

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """Every layer has a slot on the GPU."""
        return n_kv_layers is not None and self.resident_layers >= n_kv_layers

    def _resident(self, group: MixerGroup) -> int:
        return sum(i < self.resident_layers for i in group.indices)

    def state(self, group: MixerGroup, point: Point) -> State:
        """Layers by tier."""
        layer = group.mixer.state_bytes(point)
        resident = self._resident(group)
        if point.level == "ideal":
            return State(resident * layer, host=group.n_layers * layer)
        # a new tensor with every token: no spare room
        size = resident * layer
        return State(size, host=(group.n_layers - resident) * layer, allocated=size)

    def prefill_attention(
        self, group: MixerGroup, point: Point, attention: Operations
    ) -> Operations:
        """As it is; a layer without a slot holds its cache for as long as it runs."""
        return self._in_transit(group, point.at(point.prompt_tokens), attention)

    def after_prefill(self, group: MixerGroup, point: Point) -> Operations:
        """The layer's cache to the host."""
        reference = point.level == "reference"
        return (
            host_link(
                "offload_layer",
                group.mixer.state_bytes(point.at(point.prompt_tokens)),
                pinned=self.pinned and not reference,
                messages=2.0,
                source=f"{_LAYER}.offload" if reference else "",
                formula="the layer's cache to the host once",
            ),
        )

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Fetch the layer, attend, bring back what changed."""
        mixer = group.mixer
        layer = mixer.state_bytes(point)
        reference = point.level == "reference"
        new = point.batch * (mixer.kv_elements_per_token() * point.kv_element_bytes)
        cat = elementwise(
            "cache_cat",
            workspace_bytes=2 * layer,
            transient_bytes=layer,
            launches=2,
            source="transformers 5.23 cache_utils.py DynamicLayer.update (torch.cat)",
            formula="the layer's cache read and written",
        )
        return (
            host_link(
                "fetch_layer",
                layer,
                pinned=self.pinned and not reference,
                messages=2.0,
                source=f"{_LAYER}.prefetch" if reference else "",
                formula="the layer's whole cache to the GPU",
            ),
            *((cat,) if reference and point.engine.kv_growth != "cat" else ()),
            *self._in_transit(group, point, mixer.decode(point)),
            host_link(
                "write_back",
                layer + new if reference else np.asarray(new, dtype=np.float64),
                pinned=self.pinned and not reference,
                messages=2.0,
                source=f"{_LAYER}.offload" if reference else "",
                formula="the whole layer to the host" if reference else "the new token to the host",
            ),
        )

    def _in_transit(self, group: MixerGroup, point: Point, operations: Operations) -> Operations:
        """Layers of a kind that has no slot of its own pass through a transient one."""
        if self._resident(group):
            return operations
        layer = group.mixer.state_bytes(point)
        return tuple(replace(op, transient_bytes=op.transient_bytes + layer) for op in operations)
