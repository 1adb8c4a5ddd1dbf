"""What the recurrent mixers share: fixed state, the short convolution, and one scan operation.

A recurrent layer holds an fp32 state and the last columns of its causal convolution in the model's
dtype: kernel - 1 of them (``fixed_state_layout`` "exact"), or kernel ("transformers").

FLOPs. ``flops`` counts the convolution (2 k per channel) and the matmuls with the state that the
recurrence itself needs: 2 per state element for the outer-product update, for the readout and for
the delta rule's prediction. Decay, gates, exp and softplus are elementwise (``vector_flops``).
``executed_flops`` of a prompt counts the chunked matmul form that kernels run instead; with the
engine "transformers" it is what torch's flop counter counts in the model's own torch code.

Shape of ``scan_prefill`` and ``scan_step``: batch, q_len (1 for a step), n_heads, head_dim,
d_state, chunk (tokens per chunk; 1 without chunks), state_bytes (fp32 state, whole batch), tokens
(batch * q_len), and with grouped or key heads n_groups. Shape of ``causal_conv1d``: batch, q_len,
channels, kernel.
"""

from collections.abc import Mapping

import numpy as np

from costmodel.operation import Array, Operation
from costmodel.workload import Point

#: Bytes of one element of a recurrent state.
STATE_ELEMENT_BYTES = 4.0


def runs_in_torch(point: Point) -> bool:
    """Whether the engine runs transformers' own loops: its layout, and its matmuls, count."""
    return point.engine.fixed_state_layout == "transformers"


def conv_columns(point: Point, kernel: int) -> int:
    """Convolution columns an engine keeps."""
    return kernel if runs_in_torch(point) else kernel - 1


def fixed_state_bytes(
    point: Point, *, state_elements: int, conv_channels: int, conv_kernel: int
) -> Array:
    """``B (4 * state + (k - 1) * channels * b)``."""
    columns = conv_columns(point, conv_kernel)
    per_sequence = (
        STATE_ELEMENT_BYTES * state_elements + columns * conv_channels * point.element_bytes
    )
    return point.batch * per_sequence


def convolution(point: Point, *, channels: int, kernel: int, prefill: bool) -> Operation:
    """The causal depthwise convolution and its activation."""
    q_len = point.prompt_tokens if prefill else np.float64(1.0)
    tokens = point.batch * q_len
    columns = conv_columns(point, kernel) * channels * point.element_bytes
    computed = q_len
    if runs_in_torch(point):  # its padding is computed too
        computed = q_len + (kernel - 1) if prefill else np.float64(2.0)
    moved = tokens * (2.0 * channels * point.element_bytes)
    return Operation(
        name="causal_conv1d",
        kind="elementwise",
        flops=tokens * (2.0 * kernel * channels),
        executed_flops=point.batch * computed * (2.0 * kernel * channels),
        vector_flops=tokens * (4.0 * channels),
        state_bytes=point.batch * columns * (1.0 if prefill else 2.0),
        activation_bytes=moved,
        transient_bytes=moved if prefill else 0.0,
        dtype=point.dtype,
        shape={
            "batch": point.batch,
            "q_len": q_len,
            "channels": float(channels),
            "kernel": float(kernel),
        },
        formula="2 k FLOPs per channel and token; k - 1 columns kept",
    )


def scan(
    point: Point,
    *,
    name: str,
    prefill: bool,
    state_elements: int,
    flops_per_token: float,
    vector_flops_per_token: float,
    activation_elements: int,
    shape: Mapping[str, Array],
    executed_flops: Array | None = None,
    workspace_bytes: Array = 0.0,
    transient_bytes: Array = 0.0,
    launches: float = 1.0,
    source: str = "",
    formula: str = "",
) -> Operation:
    """The recurrence over a prompt, or one step of it.

    A prompt writes the final state once; a step reads and writes it. ``activation_elements`` are
    the inputs and outputs per token.
    """
    q_len = point.prompt_tokens if prefill else np.float64(1.0)
    tokens = point.batch * q_len
    state = point.batch * (STATE_ELEMENT_BYTES * state_elements)
    activations = tokens * (activation_elements * point.element_bytes)
    useful = tokens * flops_per_token
    return Operation(
        name=name,
        kind="scan_prefill" if prefill else "scan_step",
        flops=useful,
        executed_flops=useful if executed_flops is None else executed_flops,
        vector_flops=tokens * vector_flops_per_token,
        state_bytes=state if prefill else 2 * state,
        activation_bytes=activations,
        workspace_bytes=workspace_bytes,
        transient_bytes=transient_bytes + (activations if prefill else 0.0),
        launches=launches,
        dtype=point.dtype,
        shape={
            "batch": point.batch,
            "q_len": q_len,
            "tokens": tokens,
            "state_bytes": state,
            **shape,
        },
        source=source,
        formula=formula,
    )


def gated_norm(point: Point, *, width: int, prefill: bool) -> Operation:
    """Norm of the scan's output, multiplied with the gate."""
    tokens = point.batch * (point.prompt_tokens if prefill else np.float64(1.0))
    moved = tokens * (3.0 * width * point.element_bytes)
    return Operation(
        name="gated_norm",
        kind="elementwise",
        vector_flops=tokens * (10.0 * width),
        activation_bytes=moved,
        transient_bytes=moved if prefill else 0.0,
        dtype=point.dtype,
        formula="read output and gate, write one",
    )
