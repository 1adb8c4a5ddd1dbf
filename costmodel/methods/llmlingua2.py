"""LLMLingua-2: a small encoder drops the words of the prompt that matter least.

Pan et al., arXiv 2403.12968; code microsoft/LLMLingua. XLM-RoBERTa-large classifies every token of
the prompt in chunks of 510 (512 with CLS and SEP), 50 chunks at a time; the model then sees S' =
max(1, floor(rate S)) tokens and works on them as ever. The encoder's vocabulary is taken to cut
text into as many tokens as the model's (published compression usually exceeds the rate a little).

Encoder: 24 layers, d = 1024, F = 4096, 16 heads, 558,842,882 parameters in 16 bits beside the
model. Matmuls of a chunk of c tokens: 24 (2 c 12 d^2 + 4 c^2 d) FLOPs. ``ideal`` runs the tokens
there are; ``reference`` pads every chunk to 512 and attends eagerly. Left out: the loop over words
on the host, which grows with S.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from costmodel.architecture import MixerGroup
from costmodel.methods.base import (
    AbstractMethod,
    Mask,
    Preset,
    Scope,
    Stage,
    State,
    check_fraction,
)
from costmodel.methods.chains import elementwise
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point

_CODE = "microsoft/LLMLingua llmlingua/prompt_compressor.py"
#: The benchmark's rates (arXiv 2407.01527).
_PRESET_RATE = {"2x": 1 / 2, "4x": 1 / 4, "6x": 1 / 6, "8x": 1 / 8}
_CHUNK, _PADDED, _CHUNKS_PER_PASS = 510.0, 512.0, 50.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """Sizes of an XLM-RoBERTa token classifier with two classes; the defaults are the large one."""

    n_layers: int = 24
    d_model: int = 1024
    d_ff: int = 4096
    n_heads: int = 16
    vocab_size: int = 250_002
    n_positions: int = 514

    @property
    def n_parameters(self) -> int:
        """Embeddings (words, positions, one type, norm); per layer four projections, two norms, two
        MLP matrices, with biases; the two-class head.
        """
        d, f = self.d_model, self.d_ff
        layer = 4 * (d * d + d) + 4 * d + 2 * d * f + f + d
        return (self.vocab_size + self.n_positions + 3) * d + self.n_layers * layer + 2 * d + 2


ENCODER = Encoder()
ENCODER_PARAMETERS = ENCODER.n_parameters


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LLMLingua2(AbstractMethod):
    """Prompt compression before the model."""

    NAME: ClassVar[str] = "llmlingua2"
    TITLE: ClassVar[str] = "LLMLingua-2: drop unimportant words of the prompt"
    REFERENCE: ClassVar[str] = "Pan et al., arXiv 2403.12968; github.com/microsoft/LLMLingua"
    STAGES: ClassVar[frozenset[Stage]] = frozenset({"prompt"})
    ACTS: ClassVar[str] = "before prefill"
    SCOPE: ClassVar[Scope] = "none"
    DOES_NOT_SAVE: ClassVar[str] = (
        "weights: it adds 1.1 GB of its own, and an encoder pass over the whole prompt."
    )
    REALISED_BY: ClassVar[tuple[str, ...]] = ("llmlingua, in front of any engine",)
    PARAMETERS: ClassVar[dict[str, str]] = {
        "rate": "share of the prompt's tokens kept; less is smaller",
        "preset": "the benchmark's 2x, 4x, 6x or 8x: rates 1/2, 1/4, 1/6, 1/8",
    }
    STATE_FORMULA: ClassVar[str] = "as full attention over S' = max(1, floor(rate S)) tokens"
    PRESET_SETS: ClassVar[tuple[str, ...]] = ("rate",)

    rate: float = 0.5
    preset: Preset | None = None

    def __post_init__(self) -> None:
        check_fraction("llmlingua2", zero=False, rate=self.rate)

    @property
    def kept_rate(self) -> float:
        """The rate, or the preset's."""
        return self.rate if self.preset is None else _PRESET_RATE[self.preset]

    def resolved(self, context_tokens: int) -> "LLMLingua2":
        """The preset's rate."""
        return replace(self, rate=self.kept_rate, preset=None)

    def equals_full(
        self, prompt_tokens: Array, cached_tokens: Array, n_kv_layers: int | None = None
    ) -> Mask:
        """At a rate of 1 nothing runs."""
        return self.kept_rate >= 1

    def prompt_tokens(self, prompt_tokens: Array) -> Array:
        """S' = max(1, floor(rate S))."""
        s = np.asarray(prompt_tokens, dtype=np.float64)
        # 1/6 of 6 is one token, whatever the last bit of the product says
        return np.maximum(np.floor(s * self.kept_rate + 1e-9), 1.0)

    def prompt_weights_bytes(self) -> float:
        """The encoder in 16 bits."""
        return 0.0 if self.kept_rate >= 1 else 2.0 * ENCODER_PARAMETERS

    def prompt_operations(self, point: Point) -> Operations:
        """The encoder over the original prompt."""
        return () if self.kept_rate >= 1 else encoder_operations(ENCODER, point)

    def state(self, group: MixerGroup, point: Point) -> State:
        """The model's own."""
        return State(group.n_layers * group.mixer.state_bytes(point))

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """The model's own."""
        return group.mixer.decode(point)


def encoder_operations(encoder: Encoder, point: Point) -> Operations:
    """Matmuls, attention and elementwise work of the encoder; ``point.prompt_tokens`` is the
    original length.
    """
    s = np.asarray(point.prompt_tokens, dtype=np.float64)
    d, f = encoder.d_model, encoder.d_ff
    reference = point.level == "reference"
    chunks = np.ceil(s / _CHUNK)
    last = s - (chunks - 1) * _CHUNK + 2
    tokens = point.batch * (chunks * _PADDED if reference else s + 2 * chunks)
    pairs = point.batch * ((chunks - 1) * _PADDED**2 + (_PADDED if reference else last) ** 2)
    passes = np.ceil(point.batch * chunks / _CHUNKS_PER_PASS)
    source = f"{_CODE}, transformers modeling_xlm_roberta.py" if reference else ""
    m = tokens / passes
    runs = passes * encoder.n_layers
    gemms = tuple(
        Operation(
            name=f"encoder_{name}",
            kind="gemm",
            count=runs,
            flops=m * (2.0 * n * k),
            weight_bytes=n * k * point.element_bytes,
            activation_bytes=m * ((n + k) * point.element_bytes),
            transient_bytes=m * ((n + k) * point.element_bytes),
            dtype=point.dtype,
            shape={"m": m, "n": float(n), "k": float(k)},
            source=source,
            formula="2 m n k FLOPs, per pass of 50 chunks and layer",
        )
        for name, n, k in (
            ("qkv", 3 * d, d),
            ("out", d, d),
            ("up", f, d),
            ("down", d, f),
        )
    )
    classify = Operation(
        name="encoder_classify",
        kind="gemm",
        count=passes,
        flops=m * (4.0 * d),
        weight_bytes=2 * d * point.element_bytes,
        activation_bytes=m * ((d + 2) * point.element_bytes),
        dtype=point.dtype,
        shape={"m": m, "n": 2.0, "k": float(d)},
        source=source,
        formula="two classes per token",
    )
    return (*gemms, classify, *_attention(encoder, point, pairs / passes, m, runs, source))


def _attention(
    encoder: Encoder, point: Point, pairs: Array, m: Array, runs: Array, source: str
) -> Operations:
    """Attention both ways within chunks, and what lies between the kernels of a layer."""
    b, d, f = point.element_bytes, encoder.d_model, encoder.d_ff
    scores = pairs * encoder.n_heads
    reference = point.level == "reference"
    head_dim = d / encoder.n_heads
    return (
        Operation(
            name="encoder_attention",
            kind="prefill_attention",
            count=runs,
            flops=scores * (4.0 * head_dim),
            activation_bytes=m * (4.0 * d * b),
            workspace_bytes=scores * (8 * b + 8) if reference else 0.0,
            transient_bytes=scores * (2 * b + 4) if reference else 0.0,
            dtype=point.dtype,
            shape={
                "batch": np.maximum(m / _PADDED, 1.0),
                "q_len": np.minimum(m, _PADDED),
                "kv_len": np.minimum(m, _PADDED),
                "pairs": pairs / np.maximum(m / _PADDED, 1.0),
                "n_heads": float(encoder.n_heads),
                "n_kv_heads": float(encoder.n_heads),
                "head_dim": head_dim,
                "v_head_dim": head_dim,
                "window_tokens": np.inf,
            },
            source=source,
            formula="4 d c^2 FLOPs per chunk of c tokens, every token sees all of its chunk",
        ),
        elementwise(
            "encoder_norm_gelu",
            count=runs,
            vector_flops=m * (20.0 * d),
            activation_bytes=m * ((8.0 * d + 2.0 * f) * b),
            transient_bytes=m * ((2.0 * d + 2.0 * f) * b),
            launches=8,
            source=source,
            formula="two norms, two residual sums, GELU",
        ),
    )
