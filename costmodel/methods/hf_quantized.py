"""What the quantised caches of transformers share (``QuantizedLayer``): quanto and HQQ.

The whole prompt is quantised after prefill. Decoded tokens collect in a 16-bit residual of up to
R - 1; the R-th makes the whole cache dequantised, joined and quantised again. Every step
dequantises everything. Rq = (T - S) mod R tokens are in 16 bits.
"""

import numpy as np

from costmodel.architecture import Architecture, MixerGroup
from costmodel.methods.base import State, attention_of, layer_bytes
from costmodel.methods.chains import attend_packed, elementwise, reads_copy
from costmodel.mixers import Attention
from costmodel.mixers.attention import decode_attention
from costmodel.operation import Array, Operations
from costmodel.workload import Point

_LAYER = "transformers 5.23 cache_utils.py QuantizedLayer.update"


def refusal(method: str, architecture: Architecture) -> str | None:
    """Only models of full attention layers: the library has no quantised window or latent."""
    for mixer in (g.mixer for g in architecture.mixer_groups):
        if not isinstance(mixer, Attention) or mixer.max_kv_tokens() is not None:
            return (
                f"{method} is transformers' QuantizedCache, which needs full attention in every "
                f"layer, and {architecture.name} also has {_words(mixer.KIND)}"
            )
    return None


def _words(kind: str) -> str:
    return "windows or chunks" if kind == "attention" else f"{kind} layers"


def counts(point: Point, residual_tokens: int) -> tuple[Array, Array]:
    """(quantised tokens, tokens in 16 bits)."""
    residual = np.mod(point.cached_tokens - point.prompt_tokens, float(residual_tokens))
    return point.cached_tokens - residual, residual


def state(group: MixerGroup, point: Point, element: float, residual_tokens: int) -> State:
    """Packed and residual bytes; ``element`` bytes per quantised element."""
    mixer = attention_of(group)
    quantised, residual = counts(point, residual_tokens)
    packed = point.batch * quantised * (mixer.kv_elements_per_token() * element)
    return State(group.n_layers * (packed + layer_bytes(mixer, point, residual)))


def quantise(
    mixer: Attention,
    point: Point,
    *,
    element: float,
    chain_bytes: float,
    chain_flops: float,
    launches: float,
    source: str,
    formula: str,
) -> Operations:
    """The prompt, once. ``chain_bytes`` and ``chain_flops`` per element at level ``reference``."""
    elements = point.batch * point.prompt_tokens * mixer.kv_elements_per_token()
    reference = point.level == "reference"
    b = point.element_bytes
    return (
        elementwise(
            "quantise",
            vector_flops=elements * (chain_flops if reference else 6.0),
            state_bytes=elements * element,
            workspace_bytes=elements * chain_bytes if reference else 0.0,
            activation_bytes=0.0 if reference else elements * b,
            transient_bytes=elements * (b + (8.0 if reference else 0.0)),
            launches=launches if reference else 1,
            source=source if reference else "",
            formula=formula if reference else "K and V packed once",
        ),
    )


def decode(
    mixer: Attention,
    point: Point,
    *,
    element: float,
    bits: float,
    residual_tokens: int,
    dequantise_bytes: float,
    chain_bytes: float,
    chain_flops: float,
    launches: float,
    source: str,
) -> Operations:
    """``ideal``: packed and residual tokens read once. ``reference``: everything dequantised,
    concatenated and, every R steps, quantised again.
    """
    b = point.element_bytes
    quantised, residual = counts(point, residual_tokens)
    per_token = point.batch * mixer.kv_elements_per_token()
    packed = quantised * per_token * element
    rest = residual * per_token * b
    t = point.cached_tokens
    reference = point.level == "reference"
    attention = decode_attention(
        mixer,
        point,
        read_tokens=t,
        executed_tokens=t + 1,
        read_bytes=0.0 if reference else packed + rest,
        written_bytes=per_token * b,
        vector_flops=0.0 if reference else 2 * quantised * per_token,
        source="torch scaled_dot_product_attention over the joined copy" if reference else "",
        formula="packed and residual tokens read once"
        if not reference
        else "reads B (T + 1) K (Hk + Hv) b of the copy",
    )
    flush_elements = (t + 1) * per_token
    if not reference:
        flush = elementwise(
            "quantise_residual",
            count=1.0 / residual_tokens,
            vector_flops=6 * residual_tokens * per_token,
            state_bytes=residual_tokens * per_token * (b + element),
            launches=1,
            formula="R tokens every R steps",
        )
        attend = attend_packed(
            point, attention, packed=packed, elements=quantised * per_token, bits=bits
        )
        return (*attend, flush)
    copy = t * per_token * b
    attention = reads_copy(attention, (t + 1) * per_token * b)
    return (
        elementwise(
            "dequantise",
            vector_flops=2 * quantised * per_token,
            state_bytes=packed,
            workspace_bytes=quantised * per_token * dequantise_bytes,
            transient_bytes=quantised * per_token * 2 * b,
            launches=8,
            source=source,
            formula="all quantised tokens unpacked, shifted and scaled",
        ),
        elementwise(
            "join",
            state_bytes=rest,
            workspace_bytes=quantised * per_token * b + copy,
            transient_bytes=2 * copy,
            launches=2,
            source=f"{_LAYER} torch.cat",
            formula="dequantised, residual and new tokens read and written",
        ),
        attention,
        elementwise(
            "requantise",
            count=1.0 / residual_tokens,
            vector_flops=flush_elements * chain_flops,
            state_bytes=flush_elements * element,
            workspace_bytes=flush_elements * chain_bytes,
            transient_bytes=copy + flush_elements * 8.0,
            launches=launches,
            source=_LAYER,
            formula="the whole cache quantised again, every R steps",
        ),
    )
