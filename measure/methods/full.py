"""Full attention: every K and V in the compute type, preallocated, written in place."""

from collections.abc import Iterator
from typing import ClassVar, final

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from costmodel.methods.base import AbstractMethod
from measure.methods.base import AbstractLayerCache
from measure.methods.buffers import GrowingBuffer


@final
class FullCache(AbstractLayerCache):
    """K and V of every token."""

    NAME: ClassVar[str] = "full"

    def _build(self, method: AbstractMethod) -> None:
        shape = (self.batch, self.mixer.n_kv_heads)
        self.keys, self.values = (
            GrowingBuffer(*shape, (size,), self.dtype, self.device)
            for size in (self.mixer.head_dim, self.mixer.v_head_dim)
        )

    def _buffers(self) -> Iterator[GrowingBuffer]:
        yield self.keys
        yield self.values

    def reserve(self, n_tokens: int) -> None:
        """Room for K and V of ``n_tokens``."""
        for buffer in self._buffers():
            buffer.reserve(n_tokens)

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep everything."""
        self.keys.append(k)
        self.values.append(v)
        self.n_tokens += k.shape[2]

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append, then one attention call over all tokens; the group is the query length.

        With one query per head the CPU kernel of PyTorch 2.13 leaves most of the bandwidth unused.
        """
        self.store(k, v)
        out = scaled_dot_product_attention(self.fold(q), self.keys.entries(), self.values.entries())
        return self.unfold(out)

    def snapshot(self) -> int:
        """Remember the number of tokens."""
        return self.n_tokens

    def restore(self, snapshot: int) -> None:
        """Forget the tokens after it."""
        self.n_tokens = self.keys.length = self.values.length = snapshot
