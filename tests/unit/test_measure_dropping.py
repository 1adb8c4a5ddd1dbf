"""Methods that drop tokens keep exactly the tokens that slow, obvious code keeps."""

import pytest
import torch
from twin_cases import BATCH, HEADS, KV_HEADS, cache, part, probabilities, tokens

from measure.numerics import Rope
from measure.parts import rope_table, rotate

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


@pytest.mark.parametrize(("n", "shares"), [(20, (0.3, 0.2)), (21, (0.0, 0.3)), (12, (0.6, 0.4))])
def test_h2o_mask_hides_for_good_and_holds_everything(n, shares):
    qkv = tokens(n + 12)
    spec = f"h2o:variant=mask,heavy_fraction={shares[0]},recent_fraction={shares[1]}"
    twin, slow = cache(spec), heads(qkv)
    twin.prefill(*part(qkv, 0, n))
    heavy, recent = int(shares[0] * n), int(shares[1] * n)
    score = {key: {} for key in slow}
    for head in slow.values():
        head.kept = list(range(n))  # the first step sees everything
    for t in range(n, n + 12):
        expected = {}
        for key, head in slow.items():
            seen = [*head.kept, t]
            weights = head.weights(t, seen)
            expected[key] = weights @ head.v[seen]
            for i, w in zip(seen, weights.sum(0).tolist(), strict=True):
                score[key][i] = score[key].get(i, 0.0) + w
            old = sorted((i for i in seen if i <= t - recent), key=lambda i, s=score[key]: -s[i])
            head.kept = sorted(old[:heavy]) + [i for i in seen if i > t - recent]
        same_output(twin.decode(*part(qkv, t, t + 1)), expected)
        assert twin.keys.length == twin.values.length == t + 1
        for (b, h), head in slow.items():
            assert sorted(twin.positions.entries()[b, h].tolist()) == sorted(head.kept)


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


LARGE = [
    "h2o:heavy_fraction=0.5,recent_fraction=0.5",
    "tova:keep_tokens=64",
    "snapkv",
    "pyramidkv",
    "streaming_llm",
]


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
    "h2o:variant=mask",
    "tova:keep_tokens=8",
    "snapkv:keep_tokens=12,window_tokens=4",
    "pyramidkv:keep_tokens=12,window_tokens=4",
    "streaming_llm:sink_tokens=2,window_tokens=7",
    "streaming_llm:sink_tokens=2,window_tokens=7,positions=fixed",
]


@pytest.mark.parametrize("spec", [*SMALL, "quest:page_tokens=4,keep_tokens=8", "kvquant",
                                  "kv_offload:resident_layers=1"])  # fmt: skip
@pytest.mark.parametrize(("form", "reserve"), [("best", 0), ("best", 40), ("reference", 40)])
def test_a_step_can_be_taken_back(spec, form, reserve):
    twin, qkv = cache(spec, reserve=reserve, realisation=form), tokens(31)
    twin.place(0, 4)
    twin.prefill(*part(qkv, 0, 30))
    keys = next(twin._buffers())
    mark, held, layout = twin.snapshot(), twin.held_bytes, keys.entries().stride()
    first = twin.decode(*part(qkv, 30, 31))
    twin.restore(mark)
    assert (twin.n_tokens, twin.held_bytes) == (30, held)
    if reserve and form == "best":  # a buffer that had to grow stays longer
        assert keys.entries().stride() == layout, "the second step would run other kernels"
    assert torch.equal(twin.decode(*part(qkv, 30, 31)), first)


@pytest.mark.parametrize(("n", "keep", "layer"), [(40, 16, 0), (17, 16, 0), (60, 20, 1)])
@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_the_last_window_chooses(name, n, keep, layer):
    window, qkv = 4, tokens(n + 3)
    beta = ",beta=4" if name == "pyramidkv" else ""
    twin, slow = cache(f"{name}:keep_tokens={keep},window_tokens={window}{beta}"), heads(qkv)
    twin.place(layer, 2)
    twin.prefill(*part(qkv, 0, n))
    budget = keep
    if name == "pyramidkv" and n >= 2 * (keep - window):  # by hand: m = 12 or 16, beta 4
        budget = {(40, 16, 0): 4 + 21, (60, 20, 1): 4 + 4}[n, keep, layer]
    for (b, h), head in slow.items():
        votes = torch.zeros(n)
        for t in range(n - window, n):
            votes[: t + 1] += head.weights(t, list(range(t + 1))).sum(0)
        pooled = torch.nn.functional.pad(votes[: n - window], (2, 2)).unfold(0, 5, 1).mean(-1)
        best = sorted(pooled.topk(budget - window).indices.tolist())
        head.kept = best + list(range(n - window, n))
        assert torch.equal(twin.inner.keys.entries()[b, h], head.k[head.kept])
    for t in range(n, n + 3):
        for head in slow.values():
            head.kept.append(t)
        expected = {key: head.attend(t, head.kept) for key, head in slow.items()}
        same_output(twin.decode(*part(qkv, t, t + 1)), expected)


@pytest.mark.parametrize("n", [8, 9, 10, 30, 300])
def test_streaming_llm_with_sinks_at_one_distance(n):
    """Slow form: window at true distances, sinks unturned and the query at W + I."""
    sinks, window, size = 2, 7, 16
    rope, total = Rope(), n + 20
    q, k, v = tokens(total)
    table = rope_table(total, size, rope, torch.float32, torch.device("cpu"))
    fixed = tuple(x[sinks + window : sinks + window + 1] for x in table)
    twin = cache(f"streaming_llm:sink_tokens={sinks},window_tokens={window},positions=fixed")
    twin.place(0, 1, rope)
    turned = rotate(q, table), rotate(k, table), v
    found = twin.prefill(*part(turned, 0, n))
    outs = [found[:, :, t] for t in range(n)]
    outs += [twin.decode(*part(turned, t, t + 1))[:, :, 0] for t in range(n, total)]
    for t in range(total):
        lost = t >= sinks + window
        near = list(range(max(sinks, t - window + 1) if lost else sinks, t + 1))
        n_far = min(t + 1, sinks)
        for h in range(HEADS):
            one = h // GROUP
            far, to_far = turned[1][0, one, :n_far], turned[0][0, h, t]
            if lost:
                to_far = rotate(q[:1, h : h + 1, t : t + 1], fixed)[0, 0, 0]
            scores = torch.cat((far @ to_far, turned[1][0, one, near] @ turned[0][0, h, t]))
            seen = [*range(n_far), *near]
            expected = (scores / size**0.5).softmax(0) @ v[0, one, seen]
            torch.testing.assert_close(outs[t][0, h], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [8, 9, 10, 30, 300])
def test_streaming_llm_attends_places_in_the_cache(n):
    """Slow form: keep keys unrotated, rotate all of them and the query by their places."""
    sinks, window, size = 2, 7, 16
    rope, total = Rope(), n + 20
    q, k, v = tokens(total)
    table = rope_table(total, size, rope, torch.float32, torch.device("cpu"))
    twin = cache(f"streaming_llm:sink_tokens={sinks},window_tokens={window}")
    twin.place(0, 1, rope)
    turned = rotate(q, table), rotate(k, table), v
    found = twin.prefill(*part(turned, 0, n))
    outs = [found[:, :, t] for t in range(n)]
    outs += [twin.decode(*part(turned, t, t + 1))[:, :, 0] for t in range(n, total)]
    for t in range(total):
        # a prompt's query sees I + W keys with itself, a decoded one besides itself
        before = window - 1 if t < n else window
        first = max(sinks, t - before)
        seen = [i for i in range(t + 1) if i < sinks or i >= first]
        shift = 0 if t >= n else 1
        at = list(range(len(seen)))
        if t < n and t >= sinks + window:  # the query's place is I + W; its window ends there
            at = [i if i < sinks else i + shift for i in at]
        cos_sin = tuple(x[at] for x in table)
        for h in range(HEADS):
            keys = rotate(k[:, h // GROUP : h // GROUP + 1][:, :, seen], cos_sin)[0, 0]
            query = rotate(q[:1, h : h + 1, t : t + 1], tuple(x[-1:] for x in cos_sin))[0, 0, 0]
            expected = probabilities(query, keys) @ v[0, h // GROUP, seen]
            torch.testing.assert_close(outs[t][0, h], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [13, 30, 33])
def test_quest_attends_the_best_pages_and_the_new_token(n):
    page, keep, qkv = 4, 12, tokens(n + 10)
    twin, slow = cache(f"quest:page_tokens={page},keep_tokens={keep}"), heads(qkv)
    twin.place(2, 3)
    twin.prefill(*part(qkv, 0, n))
    for t in range(n, n + 10):
        expected = {}
        for key, head in slow.items():
            bounds = []
            for start in range(0, t, page):
                keys = head.k[start : min(t, start + page)]
                low, high = keys.min(0).values, keys.max(0).values
                bounds.append(max(float(torch.maximum(x[t] * low, x[t] * high).sum())
                                  for x in head.q))  # fmt: skip
            best = sorted(range(len(bounds)), key=lambda i, x=bounds: -x[i])[:3]
            seen = [i for p in best for i in range(p * page, min(t, p * page + page))]
            expected[key] = head.attend(t, [*seen, t])
        same_output(twin.decode(*part(qkv, t, t + 1)), expected)


@pytest.mark.parametrize("spec", ["quest:page_tokens=4,keep_tokens=4", "kv_offload"])
@pytest.mark.parametrize("layer", [0, 2])
def test_dense_layers_and_offloaded_ones_are_full_attention_exactly(spec, layer):
    twin, full, qkv = cache(spec), cache("full"), tokens(25)
    twin.place(layer, 4)
    assert torch.equal(twin.prefill(*part(qkv, 0, 20)), full.prefill(*part(qkv, 0, 20)))
    dense = spec == "kv_offload" or layer < 2
    for t in range(20, 25):
        step = part(qkv, t, t + 1)
        assert torch.equal(twin.decode(*step), full.decode(*step)) == dense
