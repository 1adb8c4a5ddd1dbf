"""What is asked of the model, and the point at which a method is priced."""

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from costmodel.engines import Engine
from costmodel.errors import ConfigError
from costmodel.operation import Array
from costmodel.units import DTYPE_BYTES

Level = Literal["ideal", "reference"]


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """Batch, prompt and output lengths: scalars or arrays that broadcast.

    batch           sequences served together
    context_tokens  prompt tokens; decode is priced for the step that reads this many cached tokens
    output_tokens   tokens generated per sequence (E2E, cost, throughput and capacity use it)
    """

    batch: NDArray[np.float64]
    context_tokens: NDArray[np.float64]
    output_tokens: NDArray[np.float64]

    @classmethod
    def of(
        cls, batch: ArrayLike = 1, context_tokens: ArrayLike = 4096, output_tokens: ArrayLike = 256
    ) -> Self:
        """Build from numbers or arrays; raises ``ConfigError`` for anything but whole numbers of at
        least 1.
        """
        arrays = []
        for name, value in (
            ("batch", batch),
            ("context_tokens", context_tokens),
            ("output_tokens", output_tokens),
        ):
            try:
                array = np.asarray(value, dtype=np.float64)
            except (TypeError, ValueError):
                raise ConfigError(f"{name}: expected numbers, got {value!r}") from None
            whole = np.isfinite(array) & (array >= 1) & (array == np.floor(array))
            if not np.all(whole):
                raise ConfigError(f"{name}: expected whole numbers of at least 1, got {value!r}")
            arrays.append(array)
        try:
            np.broadcast_shapes(*(a.shape for a in arrays))
        except ValueError:
            shapes = ", ".join(str(a.shape) for a in arrays)
            raise ConfigError(
                f"batch, context_tokens and output_tokens must broadcast, got shapes {shapes}"
            ) from None
        return cls(*arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        """The broadcast shape of every result."""
        return np.broadcast_shapes(
            self.batch.shape, self.context_tokens.shape, self.output_tokens.shape
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Point:
    """The workload as a layer sees it; all token counts are float64 scalars or arrays.

    batch            sequences
    prompt_tokens    S: prompt tokens that reach the model (after prompt compression)
    cached_tokens    T: tokens in the cache that the decode step reads, prompt included (T >= S)
    reserved_tokens  tokens for which a preallocating implementation has made room (S + output)
    fed_tokens       prompt tokens of one sequence that the method itself feeds at once; 0: as many
                     as the engine does
    dtype            activation and compute type
    kv_dtype         storage type of unquantised KV entries
    level            "ideal": one fused pass over the compressed state;
                     "reference": the operation chain of the published implementation
    """

    batch: Array
    prompt_tokens: Array
    cached_tokens: Array
    reserved_tokens: Array
    dtype: str
    kv_dtype: str
    level: Level
    engine: Engine
    fed_tokens: float = 0.0

    @property
    def pass_tokens(self) -> Array:
        """Prompt tokens in one forward pass: engines (and some methods) feed long prompts in
        chunks, so that activations of no more are alive at once.
        """
        tokens = self.batch * self.prompt_tokens
        if self.engine.prefill_chunk_tokens:
            tokens = np.minimum(tokens, float(self.engine.prefill_chunk_tokens))
        if self.fed_tokens:
            tokens = np.minimum(tokens, self.batch * self.fed_tokens)
        return tokens

    @property
    def element_bytes(self) -> float:
        """Bytes of one activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def kv_element_bytes(self) -> float:
        """Bytes of one unquantised KV element."""
        return DTYPE_BYTES[self.kv_dtype]

    def at(self, cached_tokens: Array) -> "Point":
        """The same point with another number of cached tokens."""
        return replace(self, cached_tokens=cached_tokens)
