"""What our own kernels take beside the cache: predicted bytes against the tensors allocated.

Nothing is launched and nothing computed: tensors lie on the ``meta`` device, launches do nothing,
and the number of SMs is a device's.
"""

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_kernels_fused import CASES, GPU, MIXER, step

from costmodel.fused_kernels import KERNELS
from costmodel.fused_room import room_of
from costmodel.layout import decode_operations
from costmodel.memory import largest_transient
from costmodel.mixers import Attention
from costmodel.mixers.mamba2 import Mamba2
from costmodel.mixers.rglru import RGLRU
from costmodel.model import Model
from costmodel.operation import Operation
from costmodel.options import Options
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
META = torch.device("meta")
SIZES = [(4096, 1), (32_768, 8), (131_072, 3), (70_000, 37)]


def n_bytes(value: Any) -> int:
    """Bytes of all tensors a value holds, in fields and in what those hold."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, tuple):
        return sum(map(n_bytes, value))
    if not type(value).__module__.startswith("measure."):
        return 0
    names = getattr(type(value), "__slots__", None) or vars(value)
    return sum(n_bytes(getattr(value, name)) for name in names if name != "__weakref__")


class _NoLaunch:
    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **constants: None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many SMs as the GPU has, and kernels that are not launched."""
    for name in ("_steps", "_dropping", "prompt_scores", "rglru_scan", "ssd_scan", "quest_decode"):
        module = importlib.import_module(f"measure.kernels.{name}")
        if hasattr(module, "sm_count"):
            monkeypatch.setattr(module, "sm_count", lambda device: GPU.n_units)
        for kernel in [k for k in vars(module) if k.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, _NoLaunch())


def cache(mixer: Attention, batch: int, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(mixer=mixer, batch=batch, device=META, **more)


def slots(op: Operation) -> int:
    return int(np.asarray(op.shape["kv_len"]))


@pytest.mark.parametrize(("tokens", "batch"), SIZES)
@pytest.mark.parametrize("kernel", ["attention16", "attention8", "flexgen4", "kivi2", "kivi4"])
def test_steps_over_tokens(device, kernel: str, tokens: int, batch: int) -> None:
    from measure.kernels import kivi_decode, token_decode
    from measure.kernels._steps import StepState

    room = tokens + 256
    bits = {"attention16": 16, "attention8": 8}.get(kernel, 4)
    if kernel.startswith("kivi"):
        extra, block = kivi_decode.EXTRA_PARTS, 128
        room = room // block * block + block
    else:
        extra, block = token_decode.EXTRA_PARTS, token_decode.BLOCK_TOKENS[bits]
    state = StepState(cache(MIXER, batch), extra, room, block)
    predicted = room_of(step(kernel, float(tokens), float(batch)), GPU.n_units)
    assert float(predicted.kept) == n_bytes(state)


@pytest.mark.parametrize(("tokens", "batch"), SIZES)
@pytest.mark.parametrize("kernel", ["h2o", "tova", "ring", "quest"])
def test_steps_that_drop_or_choose(device, kernel: str, tokens: int, batch: int) -> None:
    from measure.kernels import _dropping
    from measure.kernels._softmax import tile_tokens

    op = step(kernel, float(tokens), float(batch))
    capacity = tokens + 256 if kernel == "quest" else slots(op)
    room = _dropping.StepRoom(cache(MIXER, batch), capacity, tile_tokens(MIXER.head_dim))
    predicted = room_of(op, GPU.n_units)
    held = n_bytes(room)
    if kernel == "ring":
        from measure.kernels.ring_decode import RingRope
        from measure.numerics import Rope

        held += n_bytes(RingRope.make(Rope(theta=1e4), MIXER.head_dim, META))
    assert float(predicted.kept) == held
    if kernel in ("h2o", "tova"):
        from measure.kernels._scoring import ScoringWorkspace

        shape = (batch, MIXER.n_kv_heads, capacity, MIXER.head_dim)
        like = torch.empty(shape, dtype=torch.bfloat16, device=META)
        group = MIXER.n_heads // MIXER.n_kv_heads
        made = ScoringWorkspace.make(like, like, group, room.splits)
        assert float(predicted.shared) == n_bytes(made)


class Allocated(torch.overrides.TorchFunctionMode):
    """Bytes of what is made within, by the functions that make tensors."""

    MAKES = ("empty", "empty_like", "zeros", "logsumexp", "topk")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if getattr(function, "__name__", "") in self.MAKES:
            self.bytes += n_bytes(tuple(made) if isinstance(made, tuple) else made)
        return made


def allocated(call: Any) -> int:
    with Allocated() as counter:
        call()
    return counter.bytes


@pytest.mark.parametrize(("tokens", "batch"), [(700, 1), *SIZES])
def test_prompt_scores(device, tokens: int, batch: int) -> None:
    from measure.kernels.prompt_scores import received_scores

    def made(queries: int) -> int:
        q = torch.empty(batch, 32, queries, 128, dtype=torch.bfloat16, device=META)
        k = torch.empty(batch, 8, tokens, 128, dtype=torch.bfloat16, device=META)
        return allocated(lambda: received_scores(q, k))

    layer = batch * tokens * 8 * 256 * 2  # K and V of the prompt, alive as well
    alive = room_of(step("prompt_scores", float(tokens), float(batch)), GPU.n_units).alive
    assert float(alive) - layer == made(tokens)
    if tokens > 2048:
        alive = room_of(step("window_scores", float(tokens), float(batch)), GPU.n_units).alive
        assert float(alive) - layer == made(32)


@pytest.mark.parametrize(("tokens", "batch"), [(700, 1), *SIZES])
def test_scans(device, tokens: int, batch: int) -> None:
    from measure.kernels.rglru_scan import rglru_scan
    from measure.kernels.ssd_scan import ssd_scan

    m = CASES["ssd_scan"][2]
    assert isinstance(m, Mamba2)
    x = torch.empty(batch, tokens, m.n_heads, m.head_dim, device=META)
    bc = torch.empty(batch, tokens, m.n_groups, m.d_state, device=META)
    decay = torch.empty(batch, tokens, m.n_heads, device=META)
    state = torch.empty(batch, m.n_heads, m.head_dim, m.d_state, device=META)
    op = step("ssd_scan", float(tokens), float(batch))
    alive = float(room_of(op, GPU.n_units).alive - op.activation_bytes)
    assert alive == allocated(lambda: ssd_scan(x, bc, bc, decay, state, m.chunk_tokens))

    r = CASES["rglru_scan"][2]
    assert isinstance(r, RGLRU)
    inputs = [torch.empty(batch, tokens, r.width, dtype=torch.bfloat16, device=META)] * 3
    rate, h = torch.empty(r.width, device=META), torch.empty(batch, r.width, device=META)
    op = step("rglru_scan", float(tokens), float(batch))
    alive = float(room_of(op, GPU.n_units).alive - op.activation_bytes)
    assert alive == allocated(lambda: rglru_scan(*inputs, rate, h, first=True))


def test_quest_bounds_and_choices(device) -> None:
    from measure.kernels.quest_decode import PageCache, page_bounds

    tokens, batch, room = 32_768, 8, 32_768 + 256
    kv = torch.empty(batch, 8, room, 128, dtype=torch.bfloat16, device=META)
    pages = torch.empty(batch, 8, -(-room // 16), 128, dtype=torch.bfloat16, device=META)
    cached = PageCache(keys=kv, values=kv, low=pages, high=pages, page_tokens=16)
    q = torch.empty(batch, 32, 1, 128, dtype=torch.bfloat16, device=META)
    count = torch.empty(1, dtype=torch.int64, device=META)
    made = allocated(lambda: page_bounds(q, cached, count).topk(128, dim=-1, sorted=False))
    alive = room_of(step("quest", float(tokens), float(batch)), GPU.n_units).alive
    assert float(alive) == made


def test_every_kernel_has_a_room() -> None:
    for kernel in KERNELS:
        room = room_of(step(kernel), GPU.n_units)
        assert float(room.kept + room.shared + room.alive) >= 0


def test_peaks_of_the_engine_hold_the_room_of_all_layers() -> None:
    """H2O, 32 layers, 8 sequences: 64 KV heads, 8 splits (132 SMs x 4 / 64) of 256 query rows."""
    room = room_of(step("h2o"), GPU.n_units)
    partials = 256 * 8 * (128 + 2) * 4
    assert float(room.kept) == partials + 2 * 8
    kept = 2 * (32_768 // 10)  # 103 tiles of 64 tokens, 13 chunks of 8 tiles
    weights = 256 * kept * 2 + 256 * 103 * 4 + 64 * (kept + 1 + 2 * 13) * 4
    assert float(room.shared) == partials + weights

    where = Workload.of(8, 32_768, 256)
    model = Model.of(load_architecture("llama-3.1-8b"), "h2o", GPU, Options(engine="lccost"))
    prediction = predict(model.architecture, "h2o", where, GPU, engine="lccost")
    point = model.point(*(np.float64(x) for x in (8, 32_768, 256)))
    decode = decode_operations(model.run, point.at(point.prompt_tokens + 256))
    expected = prediction["weights_bytes"] + model.engine.reserved_bytes[0]
    expected = expected + prediction["state_allocated_bytes"] + largest_transient(decode)
    expected = expected + 32 * room.kept + room.shared
    assert float(prediction["peak_decode_bytes"]) == pytest.approx(float(expected), rel=1e-12)
