"""What runs between the matmuls: rotary embedding, norms, activations, masked attention."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from measure.numerics import Rope

#: Tensors by name; matrices may be packed (``measure.weight_formats``).
Tensors = Mapping[str, Any]
#: Cosines and signed sines [positions, rotary elements].
Rotary = tuple[Tensor, Tensor]
#: Queries whose scores are alive at once where no fused kernel knows their mask. The cost model
#: counts the same blocks (``score_block_tokens`` of the engine).
QUERY_BLOCK = 256
#: Elements of packed data unpacked at once: on a CPU half a megabyte in bf16, so that the copy
#: stays in a core's L2 cache; on a GPU, whose cache is shared and whose calls are dear, much more.
_PIECE_ELEMENTS, _GPU_PIECE_ELEMENTS = 2**18, 2**24

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}


def piece_elements(device: torch.device) -> int:
    """Elements of packed data to unpack at once."""
    return _PIECE_ELEMENTS if device.type == "cpu" else _GPU_PIECE_ELEMENTS


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over the last axis."""
    return functional.rms_norm(x, x.shape[-1:], weight, eps)


def scaled(x: Tensor, factor: float) -> Tensor:
    """``x * factor``; ``x`` itself for a factor of one."""
    return x if factor == 1.0 else x * factor


def rope_table(
    n_positions: int, size: int, rope: Rope, dtype: torch.dtype, device: torch.device
) -> Rotary:
    """Cosines and signed sines [positions, n] of ``size * fraction`` = n turning elements.

    The sines of every pair's first element are negative, so that rotating is
    ``x * cos + swapped x * sin``.
    """
    n = int(size * rope.fraction)
    positions = torch.arange(n_positions, device=device, dtype=torch.float32)
    angles = torch.outer(positions, rope.frequencies(n, device))
    cos, sin = angles.cos() * rope.amplitude, angles.sin() * rope.amplitude
    if rope.interleaved:
        pair = (
            torch.stack((cos, cos), -1).flatten(-2),
            torch.stack((-sin, sin), -1).flatten(-2),
        )
    else:
        pair = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return pair[0].to(dtype), pair[1].to(dtype)


def shared_rope_table(
    n_positions: int, size: int, rope: Rope, dtype: torch.dtype, device: torch.device
) -> Rotary:
    """``rope_table`` of at least ``n_positions``, made once for all layers that ask for it."""
    room = 1 << max(10, (n_positions - 1).bit_length())
    return _rope_table_of(room, size, rope, dtype, device)


@functools.lru_cache(maxsize=8)
def _rope_table_of(
    n_positions: int, size: int, rope: Rope, dtype: torch.dtype, device: torch.device
) -> Rotary:
    return rope_table(n_positions, size, rope, dtype, device)


def rotate(x: Tensor, table: Rotary, *, interleaved: bool = False) -> Tensor:
    """Turn the first elements of ``x`` [B, heads, S, H] by its positions' rows of the table."""
    cos, sin = table
    n = cos.shape[-1]
    turning = x[..., :n]
    if interleaved:
        swapped = turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = torch.cat((turning[..., n // 2 :], turning[..., : n // 2]), dim=-1)
    turned = (turning * cos).addcmul_(swapped, sin)
    return turned if n == x.shape[-1] else torch.cat((turned, x[..., n:]), dim=-1)


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """``cap * tanh(x / cap)``, or ``x`` without a cap."""
    return x if cap is None else torch.tanh(x / cap) * cap


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of folded queries [B, K, Q, H] over [B, K, T, H]; scores scaled by 1 / sqrt(H).

    mask   bool [Q, T], what may be seen
    cap    soft cap of the scores
    sinks  [K, Q] logits that take part in the softmax and attend to nothing
    """
    if cap is None and sinks is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = softcap(torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)), cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, :, None].expand(len(scores), -1, -1, 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.matmul(weights[..., : k.shape[2]], v)


def attend_prompt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    chunk: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    block: int = QUERY_BLOCK,
) -> Tensor:
    """Causal attention of a prompt, q [B, N, S, H], k and v [B, K, S, H], block by block.

    ``window`` lets a token see itself and the window - 1 before it, ``chunk`` its own chunk;
    ``sinks`` [N] are logits per head. ``block`` queries are masked together: as many as there are
    is what eager attention multiplies.
    """
    s, n_kv = q.shape[2], k.shape[1]
    reach = window or chunk
    if cap is None and sinks is None and (reach is None or s <= reach):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    group = q.shape[1] // n_kv
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    folded, target = q.unflatten(1, (n_kv, group)), out.unflatten(1, (n_kv, group))
    positions = torch.arange(s, device=q.device)
    # The largest block first: what it frees holds the others.
    for start in reversed(range(0, s, block)):
        stop = min(s, start + block)
        first = 0
        if window:
            first = max(0, start - window + 1)
        elif chunk:
            first = start // chunk * chunk
        rows, columns = positions[start:stop, None], positions[None, first:stop]
        mask = columns <= rows
        if window:
            mask &= columns > rows - window
        elif chunk:
            mask &= columns >= rows // chunk * chunk
        n = stop - start
        per_query = None
        if sinks is not None:
            per_query = sinks.view(n_kv, group, 1).expand(-1, -1, n).flatten(1)
        mixed = attend(
            folded[:, :, :, start:stop].flatten(2, 3),
            k[:, :, first:stop],
            v[:, :, first:stop],
            mask=mask.repeat(group, 1),
            cap=cap,
            sinks=per_query,
        )
        target[:, :, :, start:stop] = mixed.unflatten(2, (group, n))
    return out
