"""Methods that drop tokens keep exactly the tokens that slow, obvious code keeps."""

import pytest
import torch
from twin_cases import BATCH, HEADS, KV_HEADS, cache, part, probabilities, tokens

GROUP = HEADS // KV_HEADS


class SlowHead:
    """One KV head: a list of kept positions, full K and V, and what its queries attended."""

    def __init__(self, b, h, qkv):
        q, k, v = qkv
        self.k, self.v = k[b, h], v[b, h]
        self.q = q[b, h * GROUP : (h + 1) * GROUP]
        self.kept: list[int] = []

    def weights(self, t, seen):
        """Per query head: probabilities of query t over the positions ``seen``."""
        return torch.stack([probabilities(x[t], self.k[seen]) for x in self.q])

    def attend(self, t, seen):
        return self.weights(t, seen) @ self.v[seen]


def heads(qkv):
    return {(b, h): SlowHead(b, h, qkv) for b in range(BATCH) for h in range(KV_HEADS)}


def same_output(found, slow):
    for (b, h), expected in slow.items():
        torch.testing.assert_close(found[b, h * GROUP : (h + 1) * GROUP, 0], expected)


@pytest.mark.parametrize("variant", ["slot", "real_drop"])
@pytest.mark.parametrize(("n", "shares"), [(20, (0.3, 0.2)), (21, (0.0, 0.3)), (300, (0.1, 0.05))])
def test_h2o_keeps_the_heavy_and_the_recent(variant, n, shares):
    total, qkv = n + 12, tokens(n + 12)
    spec = f"h2o:variant={variant},heavy_fraction={shares[0]},recent_fraction={shares[1]}"
    twin, slow = cache(spec), heads(qkv)
    twin.prefill(*part(qkv, 0, n))
    heavy, recent = int(shares[0] * n), int(shares[1] * n)
    score = {}
    for key, head in slow.items():
        sums = torch.zeros(n)
        for t in range(n):
            sums[: t + 1] += head.weights(t, list(range(t + 1))).sum(0)
        order = sums[: n - recent].argsort(descending=True)[:heavy].tolist()
        head.kept = sorted(order) + list(range(n - recent, n))
        score[key] = {i: float(sums[i]) for i in head.kept}
    for t in range(n, total):
        for (b, h), head in slow.items():
            assert sorted(twin.positions.entries()[b, h].tolist()) == sorted(head.kept)
        expected = {}
        for key, head in slow.items():
            seen = [*head.kept, t]
            weights = head.weights(t, seen)
            expected[key] = weights @ head.v[seen]
            for i, w in zip(seen, weights.sum(0).tolist(), strict=True):
                score[key][i] = score[key].get(i, 0.0) + w
            old = [i for i in seen if i <= t - recent]
            head.kept = [i for i in seen if i != min(old, key=lambda i, s=score[key]: s[i])]
        same_output(twin.decode(*part(qkv, t, t + 1)), expected)


@pytest.mark.parametrize("n", [5, 15, 16, 17, 40])
def test_tova_drops_the_least_attended(n):
    qkv, keep = tokens(n + 20), 16
    twin, slow = cache(f"tova:keep_tokens={keep}"), heads(qkv)
    twin.prefill(*part(qkv, 0, n))
    kept = []
    for b in range(BATCH):
        mean = sum(slow[b, h].weights(n - 1, list(range(n))).sum(0) for h in range(KV_HEADS))
        kept.append(sorted(mean.topk(min(keep, n)).indices.tolist()))
    for t in range(n, n + 20):
        expected = {}
        for b in range(BATCH):
            seen, total = [*kept[b], t], 0
            for h in range(KV_HEADS):
                weights = slow[b, h].weights(t, seen)
                expected[b, h] = weights @ slow[b, h].v[seen]
                total = total + weights.sum(0)
            if len(seen) > keep:
                del seen[int(total.argmin())]
            kept[b] = seen
        same_output(twin.decode(*part(qkv, t, t + 1)), expected)


LARGE = ["h2o:heavy_fraction=0.5,recent_fraction=0.5", "tova:keep_tokens=64"]


@pytest.mark.parametrize("spec", LARGE)
def test_a_budget_that_holds_everything_is_full_attention_exactly(spec):
    twin, full, qkv = cache(spec), cache("full"), tokens(40)
    n = 40 if spec.startswith("h2o") else 20
    assert torch.equal(twin.prefill(*part(qkv, 0, n)), full.prefill(*part(qkv, 0, n)))
    for t in range(n, 40):
        step = part(qkv, t, t + 1)
        assert torch.equal(twin.decode(*step), full.decode(*step))


SMALL = [
    "h2o:heavy_fraction=0.3,recent_fraction=0.2",
    "h2o:variant=real_drop",
    "tova:keep_tokens=8",
]


@pytest.mark.parametrize("spec", SMALL)
@pytest.mark.parametrize("reserve", [0, 40])
def test_a_step_can_be_taken_back(spec, reserve):
    twin, qkv = cache(spec, reserve=reserve), tokens(31)
    twin.prefill(*part(qkv, 0, 30))
    mark, held = twin.snapshot(), twin.held_bytes
    first = twin.decode(*part(qkv, 30, 31))
    twin.restore(mark)
    assert (twin.n_tokens, twin.held_bytes) == (30, held)
    assert torch.equal(twin.decode(*part(qkv, 30, 31)), first)
