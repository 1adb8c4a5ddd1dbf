"""LLMLingua-2 run for real: an XLM-RoBERTa token classifier shortens the prompt.

Every token gets a probability to be kept, in chunks of 510 tokens between the two marks; the
floor(rate S) most probable stay, in their order. (The published code averages over words and sets a
threshold per chunk, so that it keeps about as many.) The encoder has the true sizes and random
weights unless a folder with a checkpoint is given: which tokens stay does not change what anything
costs. Tokens are taken as the encoder's own, modulo its vocabulary.

``reference`` pads every chunk to 512 tokens, passes 50 chunks of any sequence together and attends
eagerly, padding masked.
"""

from pathlib import Path
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import (
    embedding,
    gelu,
    layer_norm,
    linear,
    pad,
    scaled_dot_product_attention,
)

from costmodel.methods.llmlingua2 import ENCODER, Encoder, LLMLingua2
from measure.encoder_files import checked_encoder, shapes, theirs
from measure.methods.base import Realisation

#: Tokens of a chunk besides its two marks; marks and padding of XLM-RoBERTa.
_CHUNK, _START, _END, _PADDING = 510, 0, 2, 1
#: Chunks that pass through the encoder together.
_CHUNKS_PER_PASS = 50
_EPS = 1e-5
_SCALE = 0.02


@final
class LLMLingua2Compressor:
    """The encoder, and the choice of tokens.

    Parameters
    ----------
    dtype
        16-bit type of the weights; fp32 runs keep them in bf16.
    encoder
        Sizes of the one with random weights.
    checkpoint
        Folder with an ``XLMRobertaForTokenClassification`` in safetensors; None: random weights.
    """

    NAME: ClassVar[str] = "llmlingua2"
    REALISATIONS: ClassVar[frozenset[Realisation]] = frozenset({"best", "reference"})
    PUBLISHED_AS: ClassVar[str] = (
        "chunks padded to 512 and attended eagerly, 50 a pass; words and thresholds are left to "
        "the host upstream and not run"
    )

    def __init__(
        self,
        method: LLMLingua2,
        *,
        realisation: Realisation = "best",
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        encoder: Encoder = ENCODER,
        checkpoint: Path | None = None,
    ) -> None:
        self.method = method
        self.encoder = encoder if checkpoint is None else checked_encoder(checkpoint)
        self.is_reference = realisation == "reference"
        self.dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        if checkpoint is None:
            self.source = "XLM-RoBERTa-large, random weights"
            self.weights = _random(encoder, self.dtype, device, seed)
        else:
            self.source = (
                f"XLM-RoBERTa of {self.encoder.n_parameters:,} parameters from {checkpoint.name}"
            )
            self.weights = _loaded(checkpoint, self.encoder, self.dtype, device)

    @property
    def nbytes(self) -> int:
        """Bytes of the encoder's weights."""
        return sum(x.untyped_storage().nbytes() for x in self.weights.values())

    @torch.inference_mode()
    def compress(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> the S' = max(1, floor(rate S)) most probable of each [B, S']."""
        n = int(self.method.prompt_tokens(float(tokens.shape[1])))
        kept = self.probabilities(tokens).topk(n, dim=-1).indices.sort(dim=-1).values
        return tokens.gather(1, kept)

    def probabilities(self, tokens: Tensor) -> Tensor:
        """P(keep) [B, S] in fp32 of tokens [B, S]."""
        b, s = tokens.shape
        whole = s // _CHUNK * _CHUNK
        ids = tokens % self.encoder.vocab_size
        if self.is_reference:
            return self._padded(ids).float().softmax(dim=-1)[..., 1]
        parts = []
        if whole:
            chunks = _marked(ids[:, :whole].reshape(-1, _CHUNK))
            logits = [self._encode(x) for x in chunks.split(_CHUNKS_PER_PASS)]
            parts.append(torch.cat(logits)[:, 1:-1].reshape(b, whole, 2))
        if whole < s:
            rest = [self._encode(x) for x in _marked(ids[:, whole:]).split(_CHUNKS_PER_PASS)]
            parts.append(torch.cat(rest)[:, 1:-1])
        return torch.cat(parts, dim=1).float().softmax(dim=-1)[..., 1]

    def _padded(self, ids: Tensor) -> Tensor:
        """Logits [B, S, 2], every chunk padded to its full length (``prompt_compressor.py``)."""
        s, full = ids.shape[1], _CHUNK + 2
        chunks = [_marked(x) for x in ids.split(_CHUNK, dim=1)]
        rows = torch.stack([pad(x, (0, full - x.shape[1]), value=_PADDING) for x in chunks], 1)
        lengths = torch.tensor([x.shape[1] for x in chunks], device=ids.device)
        seen = torch.arange(full, device=ids.device) < lengths[:, None]
        seen = seen.expand(len(ids), -1, -1).flatten(0, 1)
        passes = zip(
            rows.flatten(0, 1).split(_CHUNKS_PER_PASS), seen.split(_CHUNKS_PER_PASS), strict=True
        )
        logits = torch.cat([self._encode(*x) for x in passes])
        return logits.unflatten(0, (len(ids), -1))[:, :, 1:-1].flatten(1, 2)[:, :s]

    def _encode(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """Logits [n, c, 2] of chunks [n, c], marks included; ``seen`` [n, c] are not padding, and
        the attention then is eager.
        """
        w, e = self.weights, self.encoder
        # positions count from behind the padding's
        positions = torch.arange(_PADDING + 1, _PADDING + 1 + ids.shape[1], device=ids.device)
        x = embedding(ids, w["words"]) + w["positions"][positions] + w["types"][0]
        x = _norm(x, w, "norm")
        for i in range(e.n_layers):
            qkv = linear(x, w[f"{i}.qkv"], w[f"{i}.qkv_bias"])
            q, k, v = qkv.unflatten(-1, (3, e.n_heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = _attended(q, k, v, seen).transpose(1, 2).flatten(2)
            x = _norm(x + linear(mixed, w[f"{i}.out"], w[f"{i}.out_bias"]), w, f"{i}.norm")
            hidden = gelu(linear(x, w[f"{i}.up"], w[f"{i}.up_bias"]))
            x = _norm(x + linear(hidden, w[f"{i}.down"], w[f"{i}.down_bias"]), w, f"{i}.norm2")
        return linear(x, w["head"], w["head_bias"])


def _marked(chunks: Tensor) -> Tensor:
    """Chunks [n, c] between their marks."""
    return pad(pad(chunks, (1, 0), value=_START), (0, 1), value=_END)


def _attended(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    if seen is None:
        return scaled_dot_product_attention(q, k, v)
    scores = torch.matmul(q, k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    mask = torch.where(seen[:, None, None], 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    return torch.matmul((scores + mask).softmax(dim=-1), v)


def _norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[name], w[f"{name}_bias"], _EPS)


def _random(
    encoder: Encoder, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator(device=device).manual_seed(seed)
    weights = {}
    for name, shape in shapes(encoder):
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if name.endswith("_bias"):
            weights[name] = tensor.zero_()
        elif len(shape) == 1:
            weights[name] = tensor.fill_(1.0)
        else:
            weights[name] = tensor.normal_(0.0, _SCALE, generator=generator)
    return weights


def _loaded(
    folder: Path, encoder: Encoder, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Weights from ``model.safetensors`` of a folder that was checked."""
    from safetensors import safe_open

    weights = {}
    with safe_open(folder / "model.safetensors", framework="pt", device=str(device)) as file:
        for name, _ in shapes(encoder):
            weights[name] = torch.cat([file.get_tensor(x) for x in theirs(name)]).to(dtype)
    return weights
