"""What can be observed: a model with caches and a prompt, whatever executes it.

session = open_session(point, device)        weights
session.state_bytes()                        exact caches, one layer at a time
session.prepare()                            caches with room, the prompt
clear, prefill, clear, prefill ...           or fill: T random tokens without computing them
mark, decode, reset, decode ...              one step at T tokens, put back, again
hold_shapes, capture of decode, rewind       steps as replays of one graph
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from costmodel.architecture import Architecture
from costmodel.errors import MeasurementError
from costmodel.mixers import Attention
from costmodel.registry import load_config
from measure.checkpoints import weights_from_state
from measure.config_numerics import numerics_of
from measure.engine import (
    TORCH_DTYPES,
    Decoder,
    Weights,
    check_shapes,
    pack_weights,
    random_weights,
)
from measure.methods import prompt_compressor
from measure.methods.base import AbstractLayerCache
from measure.mixers import build_cache
from measure.mixers.base import LayerState
from measure.numerics import Numerics
from measure.points import MeasurePoint


class Session(Protocol):
    """One point, ready to be timed. ``logits`` [B, V] are those of the last call."""

    point: MeasurePoint
    logits: Tensor

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights."""

    def state_bytes(self) -> tuple[int, int]:
        """Bytes held with exactly T tokens and no spare room: (all on the device, on the host)."""

    def prepare(self) -> None:
        """Make the caches that are timed, and the prompt."""

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the timed caches' storages, room included."""

    def clear(self) -> None:
        """Empty the caches."""

    def prefill(self) -> None:
        """Run the prompt into empty caches."""

    def fill(self) -> None:
        """Put T random tokens into the caches without computing them."""

    def mark(self) -> None:
        """Remember the state with T tokens."""

    def decode(self) -> None:
        """Run one step."""

    def reset(self) -> None:
        """Back to the mark."""

    def hold_shapes(self) -> str:
        """Give all steps from here on one shape, so that one can be captured and replayed as the
        next; say why that cannot be, else "".
        """

    def release_shapes(self) -> None:
        """Undo ``hold_shapes``."""

    def rewind(self) -> None:
        """Back to T tokens in count alone: what the steps since then stored may stay."""

    def details(self) -> dict[str, Any]:
        """Further keys of the record."""


def open_session(point: MeasurePoint, device: torch.device) -> Session:
    """Load or make the weights of ``point``."""
    if point.tp > 1:
        from measure.parallel.session import ParallelSession

        return ParallelSession(point, device)
    if point.engine == "transformers":
        from measure.transformers_engine.session import TransformersSession

        return TransformersSession(point, device)
    return TorchSession(point, device)


def config_of(point: MeasurePoint) -> Mapping[str, Any] | None:
    """The model's own config; None for an architecture that came without one."""
    return load_config(point.model_source) if point.model_source else None


def numerics_of_point(point: MeasurePoint) -> Numerics:
    """Return what the model's config says about its arithmetic."""
    model = point.executed
    return numerics_of(model.family, config_of(point), d_model=model.d_model)


def weights_of(point: MeasurePoint, device: torch.device) -> Weights:
    """Weights of a point; the last ones are kept, for the next point of the same model."""
    return _weights(
        point.executed,
        numerics_of_point(point),
        point.dtype,
        point.weight_dtype if point.packs_weights else None,
        device,
        point.seed,
        point.weights,
    )


@functools.lru_cache(maxsize=1)
def _weights(
    model: Architecture,
    numerics: Numerics,
    dtype: str,
    packed: str | None,
    device: torch.device,
    seed: int,
    folder: str | None,
) -> Weights:
    if folder is None:
        weights = random_weights(model, TORCH_DTYPES[dtype], device, seed, numerics=numerics)
    else:
        from measure.checkpoint_files import load_state

        state = load_state(folder, TORCH_DTYPES[dtype], device, model.n_layers)
        weights = weights_from_state(model, state)
        check_shapes(model, weights, numerics=numerics)
    return weights if packed is None else pack_weights(model, weights, packed, numerics=numerics)


class TorchSession:
    """The decoder of this package with its twins.

    What changes caches runs in inference mode: steps leave tensors that nothing else may change.
    """

    def __init__(self, point: MeasurePoint, device: torch.device) -> None:
        self.point, self.device = point, device
        self.dtype = TORCH_DTYPES[point.dtype]
        self.numerics = numerics_of_point(point)
        self.model = self._model()
        self.weights = self._weights()
        self.decoder = self._decoder(point.context_tokens + point.output_tokens)
        self.caches: list[LayerState] = []
        self.snapshots: list[Any] = []
        self.logits = torch.empty(0)
        generator = torch.Generator(device=device).manual_seed(point.seed)
        self.prompt = torch.randint(
            point.executed.vocab_size,
            (point.batch, point.context_tokens),
            generator=generator,
            device=device,
        )
        self.token = self.prompt[:, -1:]
        self.compressor = prompt_compressor(
            point.stack,
            dtype=self.dtype,
            device=device,
            seed=point.seed,
            realisation=point.realisation,
            encoder=point.encoder,
        )

    def _model(self) -> Architecture:
        """What this process holds of the model."""
        return self.point.executed

    def _weights(self) -> Weights:
        return weights_of(self.point, self.device)

    def _decoder(self, n_positions: int) -> Decoder:
        return Decoder(self.model, self.weights, n_positions=n_positions, numerics=self.numerics)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights, those of a prompt compressor too."""
        return self.weights.nbytes + (0 if self.compressor is None else self.compressor.nbytes)

    @torch.inference_mode()
    def state_bytes(self) -> tuple[int, int]:
        """One layer is alive at a time."""
        total = on_host = 0
        for cache in self._new_caches(output_tokens=None):
            cache.fill(self.point.prompt_tokens, self.point.seed)
            if cache.storage_bytes != cache.held_bytes:
                raise MeasurementError(
                    f"{self.point.stack.spec}: expected no spare room in an exact cache, got "
                    f"{cache.storage_bytes} bytes for {cache.held_bytes}"
                )
            total += cache.storage_bytes
            on_host += cache.host_bytes if isinstance(cache, AbstractLayerCache) else 0
            cache.clear()
        return total, on_host

    def prepare(self) -> None:
        """Room for the prompt and the output."""
        self.caches = self._new_caches(self.point.output_tokens)

    @property
    def allocated_bytes(self) -> int:
        """All storages."""
        return sum(cache.storage_bytes for cache in self.caches)

    @torch.inference_mode()
    def clear(self) -> None:
        """Empty all caches."""
        for cache in self.caches:
            cache.clear()

    def prefill(self) -> None:
        """The whole prompt at once, compressed before where a method does so."""
        prompt = self.prompt if self.compressor is None else self.compressor.compress(self.prompt)
        self.logits = self.decoder.prefill(prompt, self.caches)

    @torch.inference_mode()
    def fill(self) -> None:
        """Random keys and values, layer by layer."""
        for cache in self.caches:
            cache.fill(self.point.prompt_tokens, self.point.seed)

    @torch.inference_mode()
    def mark(self) -> None:
        """Snapshots of all caches."""
        self.snapshots = [cache.snapshot() for cache in self.caches]

    def decode(self) -> None:
        """One token per sequence."""
        self.logits = self.decoder.decode(self.token, self.caches)

    @torch.inference_mode()
    def reset(self) -> None:
        """Put the snapshots back."""
        for cache, snapshot in zip(self.caches, self.snapshots, strict=True):
            cache.restore(snapshot)
        self.rewind()

    def hold_shapes(self) -> str:
        """The first reason of any part."""
        reasons = [self.decoder.why_not_captured()]
        reasons += [cache.hold_shapes() for cache in self.caches]
        return next(filter(None, reasons), "")

    def release_shapes(self) -> None:
        """In every cache."""
        for cache in self.caches:
            cache.release_shapes()

    @torch.inference_mode()
    def rewind(self) -> None:
        """The device's counts are those of the host, which replays leave as they are."""
        self.decoder.clock.reset(self.caches[0].n_tokens if self.caches else 0)
        for cache in self.caches:
            cache.reset_steps()

    def details(self) -> dict[str, Any]:
        """What compressed the prompt, if anything did."""
        return {} if self.compressor is None else {"prompt_encoder": self.compressor.source}

    def _new_caches(self, output_tokens: int | None) -> list[LayerState]:
        """Empty caches with room for prompt and output; None: that grow with what they hold."""
        point = self.point
        room = 0 if output_tokens is None else point.prompt_tokens + output_tokens
        mixers = [mixer for layer in self.model.layers for mixer in layer.mixers]
        n_kv_layers, caches = sum(m.HAS_KV for m in mixers), []
        for index, mixer in enumerate(mixers):
            cache = build_cache(
                point.stack,
                mixer,
                batch=point.batch,
                dtype=self.dtype,
                device=self.device,
                # a cache of tokens makes its room when it knows its place
                reserve_tokens=0 if isinstance(mixer, Attention) else room,
                fused=point.engine == "lccost",
                realisation=point.realisation,
            )
            if isinstance(cache, AbstractLayerCache):
                ordinal = sum(m.HAS_KV for m in mixers[:index])
                cache.place(ordinal, n_kv_layers, self.numerics.rope)
                if output_tokens is not None:
                    cache.make_room(point.prompt_tokens, output_tokens)
            cache.keep_time(self.decoder.clock)
            caches.append(cache)
        keeping = [c for c in caches if isinstance(c, AbstractLayerCache)]
        for cache, successor in itertools.pairwise(keeping):
            cache.link(successor)
        return caches
