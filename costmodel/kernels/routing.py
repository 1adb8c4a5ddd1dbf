"""How many tokens each expert of one GPU gets.

random      every token picks k of E experts alike: what models are trained towards
dealt       experts are dealt out in turn, as benchmarks call "balanced": all equal, none idle
power law   loads follow a power law with exponent a, and this GPU is the busiest one

The power law is the published tables' own way of dealing (aiconfigurator, ``collector/helper.py``,
``_generate_power_law_distribution``): draws from x^-a on [1, 0.8 T], or on [0.01, 2] where there
are fewer assignments than experts, scaled to T k and rounded. What rounding leaves over goes to the
least loaded experts of every GPU in turn; tables before that rule gave it to the most loaded, and
where all rounded to none (a few tokens) to the first experts, all of them on one GPU.
"""

import functools

import numpy as np
from numpy.typing import NDArray

from costmodel.operation import Array

Floats = NDArray[np.float64]

#: Most tokens one expert is drawn under a power law, as a share of all; and the other range.
LARGEST_SHARE = 0.8
FEW_RANGE = (0.01, 2.0)
#: Draws that are averaged, and classes of like load that they are sorted into.
N_DRAWS = 4
N_CLASSES = 16
#: Exponents this near to 1 are taken for 1 + this: the integral has another form at 1.
NEAREST_EXPONENT = 1e-6


def experts_hit(tokens: Array, top_k: Array, n_experts: Array) -> Array:
    """Share of experts that get at least one token when k of E are chosen evenly.

    1 - (1 - k / E)^T.
    """
    share = np.minimum(np.asarray(top_k, dtype=np.float64) / n_experts, 1.0 - 1e-12)
    hit: Array = -np.expm1(np.asarray(tokens, dtype=np.float64) * np.log1p(-share))
    return hit


def loads(
    tokens: Array,
    top_k: Array,
    n_experts: Array,
    local_experts: Array,
    skew: Array = 0.0,
    *,
    dealt: Array = 0.0,
    leftovers_first: Array = 0.0,
) -> list[tuple[Array, Array]]:
    """Classes of this GPU's experts that are hit: (how many, tokens each).

    ``skew`` is the exponent of power-law routing, 0 for even routing; ``dealt`` 1 deals evenly
    instead of at random; ``leftovers_first`` 1 is the older rule for what rounding leaves over.
    """
    t, k, e, local = (
        np.asarray(v, dtype=np.float64) for v in (tokens, top_k, n_experts, local_experts)
    )
    mean = t * k * local / e
    hit = local * experts_hit(t, k, e)
    if np.any(dealt):
        hit = np.where(np.asarray(dealt) > 0, np.clip(mean, 1.0, local), hit)
        mean = np.where(np.asarray(dealt) > 0, np.maximum(mean, 1.0), mean)
    even: list[tuple[Array, Array]] = [(hit, mean / np.maximum(hit, 1e-9))]
    if not np.any(skew):
        return even
    given = (t, k, e, local, leftovers_first, skew)
    shape = np.broadcast_shapes(*(np.shape(v) for v in given))
    columns = [np.broadcast_to(v, shape).ravel().tolist() for v in given]
    classes = np.zeros((*shape, N_CLASSES, 2)).reshape(-1, N_CLASSES, 2)
    for i, row in enumerate(zip(*columns, strict=True)):
        if row[-1] > 0:
            classes[i] = _busiest(*row)
    classes = classes.reshape(*shape, N_CLASSES, 2)
    skewed = np.broadcast_to(np.asarray(skew) > 0, shape)
    out: list[tuple[Array, Array]] = [(np.where(skewed, 0.0, n), load) for n, load in even]
    out += [(classes[..., c, 0], classes[..., c, 1]) for c in range(N_CLASSES)]
    return out


@functools.lru_cache(maxsize=65536)
def _busiest(
    tokens: float,
    top_k: float,
    n_experts: float,
    local_experts: float,
    leftovers_first: float,
    exponent: float,
) -> Floats:
    """(experts, tokens each) by class, of the busiest GPU under a power law."""
    n_gpus = max(round(n_experts / local_experts), 1)
    per_gpu = max(round(local_experts), 1)
    assigned = tokens * top_k
    few = assigned <= n_experts
    low, high = FEW_RANGE if few else (1.0, max(LARGEST_SHARE * tokens, 1.0))
    a = max(exponent, 1.0 + NEAREST_EXPONENT)
    u = _uniform(n_gpus * per_gpu)
    drawn = (low ** (1.0 - a) + u * (high ** (1.0 - a) - low ** (1.0 - a))) ** (1.0 / (1.0 - a))
    counts = np.rint(drawn * (assigned / drawn.sum(axis=1, keepdims=True)))
    deal = _leftovers_to_first if leftovers_first else _leftovers_to_least
    busiest = np.concatenate([deal(c.reshape(n_gpus, per_gpu), tokens, assigned) for c in counts])
    hit = np.sort(busiest[busiest > 0])
    out = np.zeros((N_CLASSES, 2))
    for c, part in enumerate(np.array_split(hit, N_CLASSES)):
        if part.size:
            out[c] = part.size / N_DRAWS, part.mean()
    return out


@functools.lru_cache(maxsize=64)
def _uniform(n_experts: int) -> Floats:
    """The same draws for every call: times of like shapes differ by their shapes alone."""
    return np.random.default_rng(0).random((N_DRAWS, n_experts))


def _leftovers_to_first(counts: Floats, tokens: float, assigned: float) -> Floats:
    """Loads of the busiest GPU's experts; what is left goes to the most loaded, one each."""
    flat = counts.ravel()
    order = np.argsort(-flat, kind="stable")
    left = assigned - flat.sum()
    if left > 0:
        whole, rest = divmod(left, flat.size)
        flat[order] += whole
        flat[order[: int(rest)]] += 1.0
    elif left < 0:
        flat[order[int(left) :]] -= 1.0
        flat[order[0]] -= np.maximum(-flat, 0.0).sum()
        flat = np.maximum(flat, 0.0)
    by_gpu = flat.reshape(counts.shape)
    busiest: Floats = by_gpu[by_gpu.sum(axis=1).argmax()]
    return busiest


def _leftovers_to_least(counts: Floats, tokens: float, assigned: float) -> Floats:
    """Loads of the busiest GPU's experts; every GPU's least loaded experts share what is left.

    No expert gets more than all tokens.
    """
    counts = np.minimum(counts, tokens)
    left = assigned - counts.sum()
    n_gpus = len(counts)
    share, rest = divmod(left, n_gpus)  # the first GPUs take the rest
    of_gpu = share + (np.arange(n_gpus) < rest)
    gpu = int(np.argmax(counts.sum(axis=1) + of_gpu))
    return _filled(counts[gpu], of_gpu[gpu], tokens)


def _filled(counts: Floats, more: float, most: float) -> Floats:
    """Raise the least loaded until ``more`` are spent; below zero, lower the most loaded."""
    if more < 0:
        return most - _filled(most - counts, -more, most)
    loads = np.sort(counts)
    room = np.arange(1, loads.size + 1) * loads - np.cumsum(loads)  # to level with the i-th
    n = int(np.searchsorted(room, more, side="right"))
    level, rest = divmod(loads[:n].sum() + more, n)
    loads[:n] = level
    loads[: int(rest)] += 1.0
    return np.minimum(loads, most)
