"""A cache behind a choice: methods that only evict, once the prompt is attended.

What is kept goes to another cache, by default the plain one, which holds it its own way; from then
on that cache attends and grows by every generated token.
"""

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from costmodel.errors import NotApplicableError
from costmodel.methods.base import AbstractMethod
from costmodel.methods.full import Full
from measure.methods.base import AbstractLayerCache
from measure.methods.buffers import GrowingBuffer
from measure.methods.full import FullCache
from measure.methods.kept_tokens import gather_tokens
from measure.step_clock import StepClock


class EvictingCache(AbstractLayerCache):
    """Chooses what ``inner`` is given of a prompt."""

    inner: AbstractLayerCache

    def _build(self, method: AbstractMethod) -> None:
        self._configure(method)
        self.inner = FullCache(
            Full(), self.mixer, batch=self.batch, dtype=self.dtype, device=self.device
        )

    @abstractmethod
    def _configure(self, method: AbstractMethod) -> None:
        """Read the method's parameters."""

    @abstractmethod
    def _budget(self, n_prompt: int) -> int:
        """Prompt tokens kept per KV head."""

    @abstractmethod
    def _chosen(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Tokens [B, K, C] of the prompt to keep, ascending; None: all of them."""

    @abstractmethod
    def _chosen_blindly(self, k: Tensor) -> Tensor | None:
        """The same without queries."""

    def hold_in(self, inner: AbstractLayerCache) -> None:
        """Let ``inner`` hold what is kept; it is as empty as this."""
        if inner.ROTATES:
            raise NotApplicableError(
                f"{self.NAME}+{inner.NAME}: {inner.NAME} turns keys by their place in the cache, "
                f"and behind {self.NAME} every head keeps other positions; it is priced only"
            )
        self.inner = inner

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield from self.inner._buffers()

    @property
    def host_bytes(self) -> int:
        """Bytes that the inner cache has on the host."""
        return self.inner.host_bytes

    def place(self, layer: int, n_kv_layers: int, rope: Any = None) -> None:
        """Also of the inner cache."""
        super().place(layer, n_kv_layers, rope)
        self.inner.place(layer, n_kv_layers, rope)

    def keep_time(self, clock: StepClock) -> None:
        """Also the inner cache, which lags by what was dropped."""
        super().keep_time(clock)
        self.inner.keep_time(clock)

    def hold_shapes(self) -> str:
        """As the inner cache can: the choice was made with the prompt."""
        return self.inner.hold_shapes()

    def release_shapes(self) -> None:
        """In the inner cache."""
        self.inner.release_shapes()

    def _why_shapes_change(self) -> str:
        return self.inner._why_shapes_change()

    def reset_steps(self) -> None:
        """Of the inner cache."""
        self.inner.reset_steps()

    def reserve(self, n_tokens: int) -> None:
        """Room for ``n_tokens``: how many of them are prompt is not known."""
        self.inner.reserve(n_tokens)

    def make_room(self, n_prompt: int, n_more: int) -> None:
        """Room for what is kept of the prompt, and all that follows."""
        self.inner.make_room(self._budget(n_prompt), n_more)

    def clear(self) -> None:
        """Empty the inner cache."""
        self.n_tokens = 0
        self.inner.clear()

    def prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend, choose, hand over."""
        out = self.attend_prompt(q, k, v)
        self._keep(k, v, self._chosen(q, k))
        return out

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep a prompt without queries."""
        self._keep(k, v, self._chosen_blindly(k))

    def _keep(self, k: Tensor, v: Tensor, chosen: Tensor | None) -> None:
        self.n_tokens = k.shape[2]
        if chosen is not None:
            k, v = gather_tokens(k, chosen), gather_tokens(v, chosen)
        self.inner.store(k, v)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The inner cache's step."""
        self.n_tokens += 1
        return self.inner.decode(q, k, v)

    def snapshot(self) -> Any:
        """The inner cache's, and the tokens seen."""
        return self.n_tokens, self.inner.snapshot()

    def restore(self, snapshot: Any) -> None:
        """Put both back."""
        self.n_tokens = snapshot[0]
        self.inner.restore(snapshot[1])
