"""Models that ranks share in the tests, and what every rank does with them."""

import torch
from torch import distributed

from costmodel.architecture import Architecture, Layer
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from costmodel.mlps import DenseMLP, MoE
from measure.engine import Decoder, Weights, random_weights
from measure.mixers import build_cache
from measure.parallel.decoder import ParallelDecoder
from measure.parallel.shards import shard_weights, share_of

PROMPT, TOTAL, BATCH = 9, 12, 2
CPU = torch.device("cpu")


def model(mixer: dict, mlp: object, family: str = "llama", tied: bool = False) -> Architecture:
    sizes = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "v_head_dim": 16}
    attention = Attention(**{**sizes, **mixer})
    layer = Layer(mixers=(attention,), mlps=(mlp,), other_parameters=2 * 32)
    return Architecture(
        name="shared", hub_id="shared", family=family, d_model=32, vocab_size=51,
        layers=(layer,) * 2, other_parameters=32, tied_embeddings=tied,
    )  # fmt: skip


#: Grouped heads and an odd vocabulary; one KV head for both ranks, with biases; experts.
MODELS = {
    "gqa": model({}, DenseMLP(d_ff=48), tied=True),
    "mqa_bias": model({"n_kv_heads": 1, "qkv_bias": True}, DenseMLP(d_ff=48), "qwen2"),
    "experts": model({}, MoE(n_experts=4, top_k=2, d_ff=24, shared_d_ff=16), "qwen2_moe"),
}


def weights(name: str) -> Weights:
    """The whole model's, biases too."""
    made = random_weights(MODELS[name], torch.float32, CPU, 1)
    generator = torch.Generator().manual_seed(2)
    for tensor in [t for layer in made.layers for t in layer.tensors()]:
        tensor.normal_(0.0, 0.2, generator=generator)
    return made


def tokens() -> torch.Tensor:
    return torch.randint(51, (BATCH, TOTAL), generator=torch.Generator().manual_seed(3))


def logits(decoder: Decoder, held: Architecture, method: str) -> list[torch.Tensor]:
    """Of the prompt's last token and of every step after it."""
    caches = [
        build_cache(parse_method(method), m, batch=BATCH, dtype=torch.float32, device=CPU)
        for layer in held.layers
        for m in layer.mixers
    ]
    found = [decoder.prefill(tokens()[:, :PROMPT], caches)]
    found += [decoder.decode(tokens()[:, t : t + 1], caches) for t in range(PROMPT, TOTAL)]
    return [x.clone() for x in found]


def in_a_rank() -> dict:
    """Logits of every model, and bytes of this rank's weights."""
    torch.set_num_threads(1)
    tp, rank = distributed.get_world_size(), distributed.get_rank()
    found = {}
    for name, whole in MODELS.items():
        own = shard_weights(whole, weights(name), tp, rank)
        held = share_of(whole, tp)
        decoder = ParallelDecoder(held, own, n_positions=TOTAL, vocab_size=whole.vocab_size)
        found[name] = (logits(decoder, held, "full"), own.nbytes)
    return found


def fails_in_one_rank() -> None:
    if distributed.get_rank() == 1:
        raise MemoryError("no room")
