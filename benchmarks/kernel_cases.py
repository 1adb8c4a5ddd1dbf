"""What ``kernels_gpu.py`` times and checks: twins' steps, and libraries' attention."""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from costmodel.methods.h2o import H2O
from costmodel.methods.parse import parse_method
from costmodel.mixers import Attention
from measure.methods import build_layer_cache

#: Llama-3-8B's.
GEOMETRY = Attention(n_heads=32, n_kv_heads=8, head_dim=128, v_head_dim=128)
#: Steps replayed between two restores lengthen the cache; so much room is made.
ROOM_TOKENS = 1024
#: Methods that choose tokens by scores.
CHOOSING = ("h2o", "tova", "quest")


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to time: ``call`` makes a step, ``before`` puts back what it changed.

    ``context`` tokens are cached; ``another`` makes the same of one layer more.
    """

    name: str
    form: str
    context: int
    call: Callable[[], Tensor]
    before: Callable[[], object]
    another: Callable[[], "Case"]


def twin_case(
    spec: str, form: str, context: int, batch: int, device: torch.device, seed: int = 0
) -> Case:
    """A twin's step: ``fused`` by kernels, ``torch`` without, ``reference`` the published chain."""
    cache = build_layer_cache(
        parse_method(spec).resolved(context),
        GEOMETRY,
        batch=batch,
        dtype=torch.bfloat16,
        device=device,
        reserve_tokens=context + ROOM_TOKENS,
        fused=form == "fused",
        realisation="reference" if form == "reference" else "best",
    )
    # the third of its model's caches: Quest's first two are dense
    cache.place(2, 3)
    cache.fill(context, seed)
    q, k, v = tokens(batch, device, seed)
    snapshot = cache.snapshot()
    return Case(
        name=spec,
        form=form,
        context=context,
        call=lambda: cache.decode(q, k, v),
        before=lambda: cache.restore(snapshot),
        another=lambda: twin_case(spec, form, context, batch, device, seed + 1),
    )


def tokens(batch: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A new token's q, k and v.

    Elements of q are powers of two: their products with keys are exact whatever type they are made
    in, so that rounding does not have one form choose other pages than the other.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = {"dtype": torch.bfloat16, "device": device, "generator": generator}
    heads = (GEOMETRY.n_heads, GEOMETRY.n_kv_heads, GEOMETRY.n_kv_heads)
    q, k, v = (torch.randn(batch, n, 1, GEOMETRY.head_dim, **shape) for n in heads)  # type: ignore[call-overload]
    return q.sign() * q.float().abs().log2().round().exp2().to(q.dtype), k, v


def library_cases(context: int, batch: int, device: torch.device) -> Iterator[Case]:
    """Attention of libraries over a bf16 cache: no append, so they do a little less."""
    shape = (batch, GEOMETRY.n_kv_heads, context, GEOMETRY.head_dim)
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in "kv")
    q = tokens(batch, device, 1)[0]

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    # Queries of one KV head as the rows of one: the kernel that PyTorch takes then may differ.
    folded = q.view(batch, GEOMETRY.n_kv_heads, -1, GEOMETRY.head_dim)
    calls: dict[str, Callable[[], Tensor]] = {
        "sdpa_flash": flash,
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "sdpa_folded": lambda: scaled_dot_product_attention(folded, k, v),
    }
    if batch == 1 and importlib.util.find_spec("flashinfer") is not None:
        import flashinfer

        q1, k1, v1 = q[0, :, 0], k[0], v[0]
        calls["flashinfer"] = lambda: flashinfer.single_decode_with_kv_cache(
            q1, k1, v1, kv_layout="HND"
        )
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_with_kvcache

        fq, fk, fv = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        calls["flash_attn"] = lambda: flash_attn_with_kvcache(fq, fk, fv)

    def another(name: str) -> Case:
        return next(c for c in library_cases(context, batch, device) if c.name == name)

    for name, call in calls.items():
        yield Case(name, "library", context, call, lambda: None, partial(another, name))


def kept_case(context: int, batch: int, device: torch.device) -> Case:
    """Plain decode over as many tokens as H2O keeps, beside which scoring is judged."""
    method = parse_method("h2o").resolved(context)
    assert isinstance(method, H2O)
    tokens_kept = int(sum(float(x) for x in method.budget(float(context))))
    return replace(twin_case("full", "fused", tokens_kept, batch, device), form="kept")


def cases(
    context: int, batch: int, device: torch.device, methods: tuple[str, ...]
) -> Iterator[tuple[str, str, Callable[[], Iterator[Case]]]]:
    """Everything timed at a point: (name, form, maker). Each is made when it is its turn: it holds
    a cache. One maker makes all libraries' cases, which share one; the name is the first's.
    """
    yield "sdpa_flash", "library", lambda: library_cases(context, batch, device)
    for spec in methods:
        forms = ["fused"]
        # The chain repeats caches to all query heads; larger ones do not fit beside the cache.
        if spec.startswith(("kivi", "flexgen")) and context * batch <= 2**18:
            forms += ["torch", "reference"]
        for form in forms:
            yield spec, form, partial(one_case, spec, form, context, batch, device)
        if spec == "h2o":
            yield "full", "kept", lambda: iter([kept_case(context, batch, device)])


def one_case(
    spec: str, form: str, context: int, batch: int, device: torch.device
) -> Iterator[Case]:
    yield twin_case(spec, form, context, batch, device)


def agreement(spec: str, device: torch.device, context: int = 4096 + 126) -> float:
    """Largest difference of fused steps from the torch form, over the largest output.

    Three steps, so that what the first appended, and a block that the second filled, are attended;
    one step of methods that choose tokens, whose later choices hang on roundings.
    """
    steps = 1 if spec.startswith(CHOOSING) else 3
    outs = []
    for form in ("fused", "torch"):
        call = twin_case(spec, form, context, 2, device).call
        outs.append(torch.stack([call().float() for _ in range(steps)]))
    return float((outs[0] - outs[1]).abs().max() / outs[1].abs().max())
