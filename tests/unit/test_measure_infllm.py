"""InfLLM against a slow form that walks query by query; its block cache and host blocks."""

from types import SimpleNamespace

import pytest
import torch
from twin_cases import BATCH, HEADS, KV_HEADS, SIZE, cache, part, tokens

from measure.methods import infllm_blocks
from measure.numerics import Rope
from measure.parts import rope_table, rotate

GROUP = HEADS // KV_HEADS
BLOCK, INIT, LOCAL, TOPK, BEST = 4, 3, 10, 2, 2
SPEC = (
    f"infllm:block_tokens={BLOCK},init_tokens={INIT},local_tokens={LOCAL},topk={TOPK},"
    f"cached_blocks=3,repr_topk={BEST},chunk_tokens="
)
PLAIN = INIT + LOCAL + TOPK * BLOCK


class SlowSequence:
    """One sequence: everything is kept; what a query sees is a list of positions."""

    def __init__(self, b, qkv, rope, total):
        q, k, v = (x[b] for x in qkv)
        table = rope_table(total, SIZE, rope, torch.float32, torch.device("cpu"))
        fixed = tuple(x[LOCAL : LOCAL + 1] for x in table)
        self.near, self.turned = rotate(q[None], table)[0], rotate(k[None], table)[0]
        self.far, self.k, self.v = rotate(q[None], fixed)[0], k, v
        self.blocks: list[int] = []  # first positions
        self.represented: list[torch.Tensor] = []
        self.received = torch.zeros(HEADS, total)

    def lookup(self, first, last):
        """Blocks for queries ``first`` to ``last``."""
        if len(self.blocks) <= TOPK:
            return self.blocks
        mean = self.far[:, first:last].mean(1).flatten()
        scores = torch.stack([mean @ r.flatten() for r in self.represented])
        return [self.blocks[i] for i in scores.topk(TOPK).indices.tolist()]

    def attend(self, i, blocks):
        window = list(range(max(0, i - LOCAL + 1), i + 1))
        away = list(range(min(INIT, max(0, i - LOCAL + 1))))
        away += [j for start in blocks for j in range(start, start + BLOCK)]
        away += range(INIT + len(self.blocks) * BLOCK, i - LOCAL + 1)
        out = []
        for h in range(HEADS):
            one = h // GROUP
            scores = torch.cat(
                (self.turned[one, window] @ self.near[h, i], self.k[one, away] @ self.far[h, i])
            )
            weights = (scores / SIZE**0.5).softmax(0)
            self.received[h, window] += weights[: len(window)]
            out.append(weights @ self.v[one, window + away])
        return torch.stack(out)

    def cut(self, seen):
        """Form the blocks that are due with ``seen`` tokens."""
        while INIT + LOCAL + (len(self.blocks) + 1) * BLOCK <= seen:
            start = INIT + len(self.blocks) * BLOCK
            best = self.received[:, start : start + BLOCK].topk(BEST, dim=1).indices + start
            self.blocks.append(start)
            self.represented.append(
                torch.stack([self.k[h // GROUP, best[h]].mean(0) for h in range(HEADS)])
            )


@pytest.mark.parametrize("reserve", [0, 100])
@pytest.mark.parametrize(("n", "chunk"), [(22, 8), (33, 8), (64, 16), (40, 7), (64, 300)])
def test_prompt_and_steps_equal_the_slow_form(n, chunk, reserve):
    rope, total = Rope(), n + 20
    qkv = tokens(total)
    twin = cache(SPEC + str(chunk), reserve=reserve)
    twin.place(0, 1, rope)
    slow = [SlowSequence(b, qkv, rope, total) for b in range(BATCH)]
    found = twin.prefill(*part(qkv, 0, n))
    for b, sequence in enumerate(slow):
        for start in range(0, n, chunk):
            stop = min(n, start + chunk)
            blocks = sequence.lookup(start, stop)
            for i in range(start, stop):
                expected = sequence.attend(i, blocks)
                torch.testing.assert_close(found[b, :, i], expected, atol=1e-5, rtol=1e-4)
            sequence.cut(stop)
    for t in range(n, total):
        mark = twin.snapshot()
        twin.decode(*part(qkv, t - 1, t))  # a wrong token, undone
        twin.restore(mark)
        found = twin.decode(*part(qkv, t, t + 1))
        for b, sequence in enumerate(slow):
            expected = sequence.attend(t, sequence.lookup(t, t + 1))
            torch.testing.assert_close(found[b, :, 0], expected, atol=1e-5, rtol=1e-4)
            sequence.cut(t + 1)
    n_blocks = (total - INIT - LOCAL) // BLOCK
    assert twin.blocks.n_blocks == n_blocks
    whole = slice(INIT, INIT + n_blocks * BLOCK)
    for host, x in zip(twin.blocks.host, qkv[1:], strict=True):
        assert torch.equal(host_tokens(host), x[:, :, whole])


def host_tokens(host):
    """Blocks [B, 1, n, K, p, H] of the host as tokens [B, K, n p, H]."""
    return host.entries()[:, 0].transpose(1, 2).flatten(2, 3)


def test_missing_blocks_are_copied_as_whole_pieces_and_awaited_behind_other_scores(monkeypatch):
    """A stream of its own takes contiguous sources; nothing reads them before the wait."""
    twin, qkv = cache(SPEC + "8"), tokens(PLAIN + 40)
    twin.prefill(*part(qkv, 0, PLAIN + 30))
    made = []

    def late(targets, sources, after):
        assert all(s.is_contiguous() for s in sources)
        made.append(len(sources))

        def wait():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)

        return wait

    expected, mark = [], twin.snapshot()
    for t in range(PLAIN + 30, PLAIN + 40):
        expected.append(twin.decode(*part(qkv, t, t + 1)))
    twin.restore(mark)
    # the copies are made at the latest moment the twin allows
    monkeypatch.setattr(infllm_blocks, "start_copies", late)
    twin.blocks.places = infllm_blocks.Places([{} for _ in range(twin.batch)], None)
    for buffer in twin.blocks.cached:
        buffer.entries().fill_(float("nan"))
    for t, one in enumerate(expected, PLAIN + 30):
        assert torch.equal(twin.decode(*part(qkv, t, t + 1)), one)
    assert sum(made) > 0


@pytest.mark.parametrize("n", [PLAIN - 8, PLAIN])
def test_as_long_as_the_budget_holds_everything_it_is_full_attention(n):
    twin, full, qkv = cache(SPEC + "8"), cache("full"), tokens(PLAIN + 1)
    assert torch.equal(twin.prefill(*part(qkv, 0, n)), full.prefill(*part(qkv, 0, n)))
    for t in range(n, PLAIN + 1):
        assert twin.host_bytes == 0
        step = part(qkv, t, t + 1)
        assert torch.equal(twin.decode(*step), full.decode(*step))
    assert twin.host_bytes > 0  # one token too many: the oldest blocks are on the host


def test_leaving_plain_attention_keeps_every_token_where_it_belongs():
    rope, qkv = Rope(), tokens(PLAIN + 1)
    twin = cache(SPEC + "8")
    twin.place(0, 1, rope)
    twin.prefill(*part(qkv, 0, PLAIN))
    twin.decode(*part(qkv, PLAIN, PLAIN + 1))
    for i, x in enumerate(qkv[1:]):
        held = torch.cat(
            (twin.first[i].entries(), host_tokens(twin.blocks.host[i]), twin.rest[i].entries()),
            dim=2,
        )
        torch.testing.assert_close(held, x, atol=1e-5, rtol=1e-4)


def test_the_least_recently_used_block_leaves_the_device():
    twin, qkv = cache(SPEC + "8"), tokens(60)
    twin.prefill(*part(qkv, 0, 60))
    for wanted in ([0, 1], [1, 2], [3, 4], [0, 4]):
        twin.blocks.bring([wanted] * BATCH)
        twin.blocks.gather([wanted] * BATCH, INIT)
        for b in range(BATCH):
            assert sorted(list(twin.blocks.places.of[b])[-2:]) == wanted
            assert len(twin.blocks.places.of[b]) <= 3
        for buffer, x in zip(twin.blocks.buffer, qkv[1:], strict=True):
            expected = [x[:, :, INIT + w * BLOCK : INIT + (w + 1) * BLOCK] for w in wanted]
            assert torch.equal(
                buffer.entries(INIT, INIT + TOPK * BLOCK), torch.cat(expected, dim=2)
            )


class Stream:
    """A stand-in for the current stream: its events say when they are waited for."""

    def __init__(self):
        self.recorded, self.waited = 0, []

    def record_event(self):
        self.recorded += 1
        number = self.recorded
        return SimpleNamespace(synchronize=lambda: self.waited.append(number))


def test_on_a_gpu_the_host_waits_once_a_step_for_what_it_asked_first(monkeypatch):
    """The path a GPU takes: ids through pinned memory, one event, copies that begin behind it."""
    n, total = PLAIN + 30, PLAIN + 40
    qkv, stream, began = tokens(total), Stream(), []
    plain, twin = (cache(SPEC + "8", reserve=total) for _ in range(2))
    twin.blocks._on_gpu = True
    twin.blocks._ids, twin.blocks._places_up = (  # page-locked on a GPU
        torch.empty(BATCH, TOPK, dtype=torch.int64) for _ in range(2)
    )
    start_copies = infllm_blocks.start_copies
    expected = [plain.prefill(*part(qkv, 0, n))]
    expected += [plain.decode(*part(qkv, t, t + 1)) for t in range(n, total)]

    def started(targets, sources, after):
        began.append((stream.recorded, list(stream.waited), after))
        return start_copies(targets, sources)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(infllm_blocks, "start_copies", started)
    assert torch.equal(twin.prefill(*part(qkv, 0, n)), expected[0])
    began.clear()
    for t, one in enumerate(expected[1:], n):
        before = stream.recorded
        assert torch.equal(twin.decode(*part(qkv, t, t + 1)), one)
        assert (stream.recorded, stream.waited[-1]) == (before + 1, before + 1)
    assert stream.waited == list(range(1, stream.recorded + 1))
    assert began
    for recorded, waited, after in began:  # behind the ids' event, which the host has seen
        assert after is not None
        assert waited[-1] == recorded
