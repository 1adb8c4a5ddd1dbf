"""What every token mixer can say about itself, for one layer of one sequence shard.

A mixer is an immutable description with exact counts. It knows no method and no hardware:
``linears`` are its projections (priced as matmuls by ``costmodel.layout``), ``other_parameters``
all the rest it stores, and the four cost hooks price what happens between the projections. Mixers
that keep a KV cache price the *unmodified* cache here; methods replace those hooks
(``costmodel.methods``).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Self

from costmodel.operation import Array, Operations
from costmodel.workload import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A weight matrix used as ``y = x W (+ b)``.

    n_in, n_out   shape; several matrices applied to the same input are one entry when engines
                  fuse them (q, k, v)
    role          "attention", "mixer", "mlp", "expert", "shared_expert", "router", "head"
    quantisable   weight-only formats store it quantised (routers, heads and small gates stay
                  16-bit)
    copies        how many matrices of this shape one layer stores (experts)
    bias          number of bias elements, stored in 16 bits
    """

    name: str
    n_in: int
    n_out: int
    role: str = "mixer"
    quantisable: bool = True
    copies: int = 1
    bias: int = 0

    @property
    def n_parameters(self) -> int:
        """Stored elements, bias included."""
        return self.copies * (self.n_in * self.n_out) + self.bias


class AbstractMixer(ABC):
    """One token mixer of a layer. All hooks are per layer and per GPU (see ``sharded``)."""

    __slots__ = ()

    #: "attention", "mla", "compressed_attention", "mamba", "mamba2", "rglru", "rwkv5", "delta",
    #: "lightning"
    KIND: ClassVar[str]
    #: whether it keeps a cache that grows with the tokens (methods act on these)
    HAS_KV: ClassVar[bool]

    @abstractmethod
    def linears(self, d_model: int) -> tuple[Linear, ...]:
        """Projections applied to every token."""

    @abstractmethod
    def other_parameters(self, d_model: int) -> int:
        """Stored parameters that are not in ``linears``: convolutions, inner norms, decays."""

    @abstractmethod
    def sharded(self, tp: int) -> Self:
        """The part one of ``tp`` GPUs holds. Raises ``NotApplicableError`` when it does not
        divide.
        """

    @abstractmethod
    def state_bytes(self, point: Point) -> Array:
        """Bytes held for all ``point.batch`` sequences with ``point.cached_tokens`` cached."""

    @abstractmethod
    def prefill(self, point: Point) -> Operations:
        """Operations between the projections, over ``point.prompt_tokens``; for one layer."""

    @abstractmethod
    def decode(self, point: Point) -> Operations:
        """The same for the step that reads ``point.cached_tokens`` cached tokens and adds one."""

    def kv_elements_per_token(self) -> int:
        """Cache elements a token adds while the cache still grows; 0 for fixed states."""
        return 0

    def max_kv_tokens(self) -> int | None:
        """Most tokens the cache holds (window, chunk); None when it grows without bound."""
        return None
