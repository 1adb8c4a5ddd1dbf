"""The only place where a model is laid out: which operations a prefill or a decode step consists
of.

Everything is for ONE GPU of a tensor-parallel group: the architecture comes in already sharded
(``Architecture.sharded``), so amounts are per GPU and ``tp`` only adds collectives and divides the
vocabulary. Token mixing comes from the method (or the mixer itself), matmuls from
``linear_groups``.

Left out: sampling, embedding lookup (one row per token), prompt padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from costmodel.architecture import Architecture, MixerGroup
from costmodel.engines import Engine
from costmodel.hardware import HardwareProfile
from costmodel.methods.stack import MethodStack
from costmodel.mixers import Attention, Linear
from costmodel.mlps import DenseMLP, MoE
from costmodel.operation import Array, Operation, Operations
from costmodel.weights import compute_dtype, linear_bytes, weights_bytes
from costmodel.workload import Point


@dataclass(frozen=True, slots=True, kw_only=True)
class Matmul:
    """A matrix with what its storage format makes of it."""

    linear: Linear
    count: int
    stored_bytes: float
    dtype: str


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Execution:
    """Everything but the token counts: what runs, how it is stored, and where. Built once per
    prediction by ``Execution.of``; one GPU's share.
    """

    architecture: Architecture
    stack: MethodStack
    hardware: HardwareProfile
    weight_dtype: str
    dtype: str
    tp: int
    mixer_groups: tuple[MixerGroup, ...]
    matmuls: tuple[Matmul, ...]
    experts: tuple[tuple[MoE, int, tuple[Matmul, ...]], ...]
    small_parameters: float
    mlp_width: float
    mlp_widths: tuple[tuple[float, bool], ...]
    has_gelu: bool
    n_all_reduces: int
    weights_bytes: float

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        stack: MethodStack,
        hardware: HardwareProfile,
        *,
        weight_dtype: str,
        dtype: str,
        tp: int,
    ) -> "Execution":
        """Lay out one GPU's share of ``architecture`` over ``tp`` GPUs."""
        sharded = architecture.sharded(tp)
        d = sharded.d_model

        def matmul(linear: Linear, count: int) -> Matmul:
            return Matmul(
                linear=linear,
                count=count,
                stored_bytes=linear_bytes(linear, weight_dtype, sharded, dtype),
                dtype=compute_dtype(linear, weight_dtype, sharded, dtype, hardware),
            )

        return cls(
            architecture=sharded,
            stack=stack,
            hardware=hardware,
            weight_dtype=weight_dtype,
            dtype=dtype,
            tp=tp,
            mixer_groups=sharded.mixer_groups,
            matmuls=tuple(matmul(x, n) for x, n in sharded.linear_groups),
            experts=tuple(
                (m, n, tuple(matmul(x, n) for x in m.expert_linears(d)))
                for m, n in sharded.mlp_groups
                if isinstance(m, MoE)
            ),
            small_parameters=_small_parameters(sharded),
            mlp_width=_mlp_width(sharded),
            mlp_widths=_mlp_widths(sharded),
            has_gelu=any(
                isinstance(mlp, DenseMLP) and mlp.activation == "gelu_tanh"
                for mlp, _ in sharded.mlp_groups
            ),
            n_all_reduces=sum(bool(x.mixers) + bool(x.mlps) for x in sharded.layers),
            weights_bytes=weights_bytes(sharded, weight_dtype, dtype, tp)
            + stack.prompt_weights_bytes(),
        )


def prefill_operations(run: Execution, point: Point) -> Operations:
    """The pass over ``point.prompt_tokens`` (what reaches the model after prompt compression).

    The LM head is the last operation.
    """
    point = replace(point, fed_tokens=run.stack.fed_tokens(point))
    return _pass(run, point, tokens=point.batch * point.prompt_tokens, decode=False)


def decode_operations(run: Execution, point: Point) -> Operations:
    """The step that reads ``point.cached_tokens`` cached tokens and adds one per sequence."""
    return _pass(run, point, tokens=point.batch, decode=True)


def _pass(run: Execution, point: Point, *, tokens: Array, decode: bool) -> Operations:
    return (
        *mixing_operations(run, point, decode=decode),
        *token_operations(run, point, tokens),
        _head(run, point),
    )


def mixing_operations(run: Execution, point: Point, *, decode: bool) -> Operations:
    """What happens between the projections, all layers: the part that depends on the context."""
    hook = run.stack.decode if decode else run.stack.prefill
    return tuple(
        replace(op, count=op.count * group.n_layers)
        for group in run.mixer_groups
        for op in hook(group, point)
    )


def holding_operations(run: Execution, point: Point, *, decode: bool) -> Operations:
    """The operations of a pass that can have bytes alive beyond weights and state: products and
    collectives work on what the elementwise operations around them hold already.
    """
    tokens = point.batch if decode else point.batch * point.prompt_tokens
    if not decode:
        point = replace(point, fed_tokens=run.stack.fed_tokens(point))
    return (
        *mixing_operations(run, point, decode=decode),
        _elementwise(run, point, tokens),
        _head(run, point),
    )


def step_operations(run: Execution, point: Point) -> Operations:
    """A decode step without ``mixing_operations``: what depends on the batch alone.

    The LM head is the last operation.
    """
    return (*token_operations(run, point, point.batch), _head(run, point))


def token_operations(run: Execution, point: Point, tokens: Array) -> Operations:
    """What every one of ``tokens`` goes through whatever its context, the LM head left out."""
    operations = [_gemm(point, matmul, tokens) for matmul in run.matmuls]
    for moe, _, matmuls in run.experts:
        read = moe.experts_read(tokens)
        operations += [_expert(point, moe, matmul, tokens, read) for matmul in matmuls]
    operations.append(_elementwise(run, point, tokens))
    operations += _collectives(run, point, tokens)
    return tuple(operations)


def _gemm(point: Point, matmul: Matmul, tokens: Array) -> Operation:
    """Product y = x W: 2 m n k FLOPs, the weights read once."""
    linear = matmul.linear
    return Operation(
        name=linear.name,
        kind="gemm",
        count=matmul.count,
        flops=tokens * (2.0 * linear.n_in * linear.n_out),
        weight_bytes=matmul.stored_bytes,
        activation_bytes=tokens * ((linear.n_in + linear.n_out) * point.element_bytes),
        dtype=matmul.dtype,
        shape={"m": tokens, "n": float(linear.n_out), "k": float(linear.n_in)},
        formula="2 m n k FLOPs; weights read once",
    )


def _expert(point: Point, moe: MoE, matmul: Matmul, tokens: Array, read: Array) -> Operation:
    """Routed experts: every token multiplies with top_k of them; a pass reads the distinct ones."""
    linear = matmul.linear
    rows = tokens * float(moe.top_k)
    computed = rows
    if moe.runs_all and point.engine.fixed_state_layout == "transformers":
        computed = tokens * float(moe.n_experts)
    moved = rows * ((linear.n_in + linear.n_out) * point.element_bytes)
    return Operation(
        name=linear.name,
        kind="moe_gemm",
        count=matmul.count,
        flops=rows * (2.0 * linear.n_in * linear.n_out),
        executed_flops=computed * (2.0 * linear.n_in * linear.n_out) if moe.runs_all else None,
        weight_bytes=read * (matmul.stored_bytes / linear.copies),
        activation_bytes=moved,
        dtype=matmul.dtype,
        shape={
            "m": tokens,
            "n": float(linear.n_out),
            "k": float(linear.n_in),
            "experts": float(moe.n_experts),
            "active_experts": read,
            "top_k": float(moe.top_k),
        },
        formula="2 m k_top n k FLOPs; E (1 - (1 - k/E)^m) experts read",
    )


def _mlp_width(architecture: Architecture) -> float:
    """Elements one token needs at the widest point of an MLP: gate, up, activation and product of a
    gated MLP (4 F), or up and activation (2 F) otherwise.
    """
    widths = [0.0]
    for mlp, _ in architecture.mlp_groups:
        per_unit = 4.0 if mlp.gated else 2.0
        widths.append(per_unit * mlp.d_ff * (mlp.top_k if isinstance(mlp, MoE) else 1))
    return max(widths)


def _mlp_widths(architecture: Architecture) -> tuple[tuple[float, bool], ...]:
    """Widths of all MLPs as a token sees them, and whether they are gated."""
    return tuple(
        (float(mlp.d_ff * (mlp.top_k if isinstance(mlp, MoE) else 1)), mlp.gated)
        for mlp, _ in architecture.mlp_groups
    )


def _alive(run: Execution, engine: Engine) -> float:
    """Elements of one token alive at the widest point of an MLP, or of attention if that counts."""
    per_width, per_model = engine.mlp_alive
    d = run.architecture.d_model
    widest = max((w * (per_width - (not gated)) for w, gated in run.mlp_widths), default=0.0)
    alive = widest + per_model * d
    if not engine.attention_alive:
        return alive
    return max([alive, *(2.0 * d + m.alive_elements() for m in _attentions(run))])


def _attentions(run: Execution) -> list[Attention]:
    return [g.mixer for g in run.mixer_groups if isinstance(g.mixer, Attention)]


def _elementwise(run: Execution, point: Point, tokens: Array) -> Operation:
    """Norms, rotary embedding, activations and residual sums, one layer's worth.

    Per token and layer about 4 d for every block (its norm and residual, read and written; a layer
    has a mixer and an MLP, or one of them) plus 3 F (activation of a gated MLP) elements pass
    through memory between kernels. The weights are every
    parameter outside the matrices: norms, convolutions, decays. Un-chunked prefill peaks when a
    gated MLP has its activated gate, up and product (3 F; 2 F without a gate) beside the layer's
    and the model's input, the residual and the normed input (4 d): within 0.3 % of the published
    peaks of an 8B model from 8k to 128k tokens. A compiled MLP holds less (``Engine.mlp_alive``).
    """
    d = run.architecture.d_model
    n_layers = max(1, run.architecture.n_layers)
    b = point.element_bytes
    blocks = run.n_all_reduces / n_layers
    alive = np.minimum(tokens, np.maximum(point.pass_tokens, point.batch))
    return Operation(
        name="norm_rope_activation",
        kind="elementwise",
        count=n_layers,
        weight_bytes=run.small_parameters * b / n_layers,
        activation_bytes=tokens * ((4.0 * d * blocks + 0.75 * run.mlp_width) * b),
        shape={"blocks": blocks, "gelu": float(run.has_gelu)},
        launches=point.engine.elementwise_launches,
        transient_bytes=alive * (_alive(run, point.engine) * b),
        dtype=point.dtype,
        formula="4 d a block + 3 F elements per token between kernels; (3 F + 4 d) alive",
    )


def _small_parameters(architecture: Architecture) -> float:
    """Everything stored outside matrices and embeddings."""
    d = architecture.d_model
    return float(
        architecture.other_parameters
        + sum(
            layer.other_parameters
            + sum(m.other_parameters(d) for m in layer.mixers)
            + sum(m.other_parameters(d) for m in layer.mlps)
            for layer in architecture.layers
        )
    )


def _head(run: Execution, point: Point) -> Operation:
    """LM head on the last token of every sequence; vocabulary-parallel over tp."""
    architecture = run.architecture
    d, v = architecture.d_model, -(-architecture.vocab_size // run.tp)
    b = point.element_bytes
    return Operation(
        name="lm_head",
        kind="gemm",
        flops=point.batch * (2.0 * d * v),
        weight_bytes=d * v * b,
        activation_bytes=point.batch * ((d + v) * b),
        transient_bytes=point.batch * (v * (b + 4.0)),
        dtype=point.dtype,
        shape={"m": point.batch, "n": float(v), "k": float(d)},
        formula="2 B d V: the last token only",
    )


def _collectives(run: Execution, point: Point, tokens: Array) -> Operations:
    """Tensor parallelism: an all-reduce after every mixer block and every MLP block, and a gather
    of the logits. Ring: each GPU sends 2 (n-1)/n of an all-reduced message.
    """
    if run.tp == 1:
        return ()
    n = run.tp
    message = tokens * (run.architecture.d_model * point.element_bytes)
    logits = point.batch * (run.architecture.vocab_size * point.element_bytes)
    make = partial(Operation, kind="collective", dtype=point.dtype)
    return (
        make(
            name="all_reduce",
            count=run.n_all_reduces,
            link_bytes=message * (2.0 * (n - 1) / n),
            activation_bytes=2 * message,
            shape={"message_bytes": message, "n_gpus": float(n)},
            formula="2 (n-1)/n of B T d b sent by each GPU",
        ),
        make(
            name="gather_logits",
            link_bytes=logits * ((n - 1) / n),
            activation_bytes=logits,
            shape={"message_bytes": logits, "n_gpus": float(n)},
            formula="(n-1)/n of B V b",
        ),
    )


def total(operations: Operations, amount: Callable[[Operation], Array]) -> Array:
    """Sum over a pass: count times the amount of each operation."""
    out: Array = np.float64(0.0)
    for op in operations:
        value = amount(op)
        if np.ndim(value) or value != 0.0:
            out = out + op.count * value
    return out
