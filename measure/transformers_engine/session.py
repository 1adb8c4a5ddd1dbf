"""A point run through transformers' own model and cache classes."""

import inspect
from dataclasses import replace
from typing import Any

import torch

from costmodel.errors import ConfigError, NotApplicableError
from costmodel.mixers import Attention
from costmodel.mixers.mla import MLA
from costmodel.registry import load_config
from measure.engine import TORCH_DTYPES
from measure.points import MeasurePoint
from measure.transformers_engine.caches import make_cache
from measure.transformers_engine.models import model_config, quiet, random_model
from measure.transformers_engine.state import (
    ModuleSnapshot,
    ModuleState,
    Snapshot,
    held,
    storage_bytes,
)


class TransformersSession:
    """See ``measure.sessions``."""

    def __init__(self, point: MeasurePoint, device: torch.device) -> None:
        if not point.model_source:
            raise ConfigError("--engine transformers needs the model's config.json")
        self.point, self.device = point, device
        config = model_config(
            load_config(point.model_source), point.executed, point.architecture.n_layers
        )
        self.model = random_model(
            config.to_json_string(use_diff=False), point.executed, point.dtype, device, point.seed
        )
        self.modules = ModuleState(self.model)
        names = inspect.signature(self.model.forward).parameters
        # the Mamba models have a word of their own
        self._cache_argument = "cache_params" if "cache_params" in names else "past_key_values"
        self.cache: Any = None
        self.snapshots: list[Any] = []
        self.logits = torch.empty(0)
        generator = torch.Generator(device=device).manual_seed(point.seed)
        self.prompt = torch.randint(
            point.executed.vocab_size,
            (point.batch, point.context_tokens),
            generator=generator,
            device=device,
        )

    @property
    def weights_bytes(self) -> int:
        """Bytes of all parameters, each storage once."""
        found = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for p in self.model.parameters()
        }
        return sum(found.values())

    def state_bytes(self) -> tuple[int, int]:
        """Of a cache that T tokens went into and that keeps no spare room."""
        self.clear(exact=True)
        if self._can_fill:
            self._fill()
        else:
            self.prefill()
        found = held(self._holders())
        self.clear()
        return found

    def prepare(self) -> None:
        """An empty cache."""
        self.clear()

    @property
    def allocated_bytes(self) -> int:
        """Storages behind the cache; a slice of a longer tensor keeps all of it."""
        return storage_bytes(self._holders())

    def clear(self, *, exact: bool = False) -> None:
        """Begin a new cache; ``exact`` one that grows with its tokens."""
        self.cache = None
        self.modules.clear()
        point = self.point
        if exact:
            point = replace(point, realisation="reference")
        self.cache = make_cache(point, self.model.config, self.device)

    def prefill(self) -> None:
        """The whole prompt at once, logits of the last token."""
        self._forward(self.prompt)

    def fill(self) -> None:
        """Random keys and values, layer by layer, through the cache's own update."""
        if not self._can_fill:
            raise NotApplicableError(
                "only caches of attention layers can be filled without running the prompt"
            )
        self.clear()
        self._fill()

    def _fill(self) -> None:
        generator = torch.Generator(device=self.device).manual_seed(self.point.seed)
        for index, mixer in enumerate(self._mixers):
            k, v = (
                torch.empty(
                    self.point.batch,
                    mixer.n_kv_heads,
                    self.point.context_tokens,
                    size,
                    dtype=TORCH_DTYPES[self.point.dtype],
                    device=self.device,
                ).normal_(generator=generator)
                for size in (mixer.head_dim, mixer.v_head_dim)
            )
            self.cache.update(k, v, index)

    def mark(self) -> None:
        """Remember caches and modules."""
        layers = list(self.cache.layers)
        self.snapshots = [Snapshot(layers), ModuleSnapshot(self.modules.holders())]

    def decode(self) -> None:
        """One token per sequence."""
        self._forward(self.prompt[:, -1:])

    def reset(self) -> None:
        """Put both back."""
        for snapshot in self.snapshots:
            snapshot.restore()

    def hold_shapes(self) -> str:
        """Its caches count tokens on the host."""
        return "transformers' own step runs eagerly"

    def release_shapes(self) -> None:
        """Nothing was held."""

    def rewind(self) -> None:
        """As ``reset``: the count cannot be put back alone."""
        self.reset()

    def details(self) -> dict[str, Any]:
        """Class of the cache, and where executed FLOPs are not those predicted."""
        found = {"cache_class": type(self.cache).__name__}
        is_best = self.point.realisation == "best"
        mixers = [m for layer in self.point.executed.layers for m in layer.mixers]
        if not is_best and any(not m.owns_cache for m in self._mixers):
            found["executed_note"] = (
                "transformers runs the layers that share a cache for the last prompt token only: "
                "executed_prefill_flops are fewer than predicted"
            )
        if is_best and any(isinstance(m, MLA) and m.index is not None for m in mixers):
            found["executed_note"] = (
                "the index scores all the room of the static cache: executed FLOPs are more than "
                "predicted"
            )
        return found

    @torch.inference_mode()
    def _forward(self, tokens: torch.Tensor) -> None:
        with quiet():
            out = self.model(
                input_ids=tokens,
                use_cache=True,
                logits_to_keep=1,
                **{self._cache_argument: self.cache},
            )
        self.logits = out.logits[:, -1]

    def _holders(self) -> list[Any]:
        return [*self.cache.layers, *self.modules.held()]

    @property
    def _mixers(self) -> list[Attention]:
        mixers = [m for layer in self.point.executed.layers for m in layer.mixers]
        return [m for m in mixers if isinstance(m, Attention)]

    @property
    def _can_fill(self) -> bool:
        layers = self.point.executed.layers
        return len(self._mixers) == len(layers)
