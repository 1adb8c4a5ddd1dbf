"""Which method is best at each point, by how much, and what could turn that round."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from reports.axes import AXES
from reports.comparison import Pair
from reports.labels import point, tokens
from reports.points import Namer

#: What is ranked by, where every method at a point has it; the first that does.
RANKED_BY = ("usd_per_million_output_tokens", "tpot_s", "ttft_s", "state_bytes")
_PLACE = ("gpu", "context_tokens", "batch")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Ranked:
    """One method at one point: its rank there (1 is best; None where it does not fit)."""

    pair: Pair
    place: tuple[str, ...]
    rank: int | None
    metric: str
    value: float | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Margin:
    """Best and second best at one point, and whether the stated intervals keep them apart."""

    place: str
    best: str
    second: str
    metric: str
    apart_fraction: float
    is_settled: bool | None


def rank(pairs: Sequence[Pair]) -> tuple[Ranked, ...]:
    """All pairs, longest context first, ranked within their point; what does not fit comes last.

    Where all pairs are of one method, its models are ranked against each other.
    Observed values rank where there are no predictions.
    """
    places: dict[tuple[str, ...], list[Pair]] = defaultdict(list)
    for pair, model in zip(pairs, _models(pairs), strict=True):
        places[(model, *(pair.key.text(f) for f in _PLACE))].append(pair)
    ranked: list[Ranked] = []
    for place, members in places.items():
        metric = _metric_of(members)
        order = sorted(members, key=lambda p: (does_not_fit(p), _missing(p, metric)))
        n = 0
        for pair in order:
            value = value_of(pair, metric)
            counts = not does_not_fit(pair) and value is not None
            n += counts
            ranked.append(
                Ranked(
                    pair=pair, place=place, rank=n if counts else None, metric=metric, value=value
                )
            )
    first = {place: i for i, place in enumerate(places)}
    # Models and devices in file order, within them the longest contexts first.
    kin = {place[:2]: i for i, place in reversed(list(enumerate(places)))}
    return tuple(
        sorted(
            ranked,
            key=lambda r: (
                kin[r.place[:2]],
                -(r.pair.key.number("context_tokens") or 0.0),
                first[r.place],
            ),
        )
    )


def _models(pairs: Sequence[Pair]) -> list[str]:
    """The model of each pair's place: methods compete on a model. Where there is but one method,
    models compete, and the place names none.
    """
    names = [pair.key.text("model") for pair in pairs]
    one = len({pair.key.method_spec for pair in pairs}) == 1
    return [""] * len(names) if one else names


def value_of(pair: Pair, metric: str) -> float | None:
    """The predicted value, or the observed one where nothing is predicted."""
    predicted = pair.value(metric, "predicted")
    return pair.value(metric, "observed") if predicted is None else predicted


def does_not_fit(pair: Pair) -> bool:
    """Whether the prediction says that the point exceeds the memory."""
    return pair.predicted is not None and pair.predicted.values.get("fits") is False


def verdict(ranked: Sequence[Ranked]) -> str:
    """One sentence about the point that most methods share (the longest context of several)."""
    if not ranked:
        return "There is nothing to report: the files hold no record that could be used."
    members = _main_place(ranked)
    namer = Namer([r.pair for r in members])
    where = _where(members)
    fitting = [r for r in members if r.rank is not None]
    if not fitting:
        if any(does_not_fit(r.pair) for r in members):
            return f"{where} no method fits the memory of the device."
        return f"{where} no time is known for any method."
    best = fitting[0]
    text = AXES[best.metric]
    said = f"{text.format(best.value or 0.0)}{_PER[best.metric]}"
    sentence = f"{where} {_name(best, namer)} {_BEST[best.metric]}: {said}"
    full = next((r for r in members if r.pair.key.text("method") == "full"), None)
    if full is not None and full is not best:
        sentence += _against_full(best, full)
    elif full is best and len(fitting) > 1 and fitting[1].value and best.value:
        sentence += (
            f"; the next, {_name(fitting[1], namer)}, takes "
            f"{times(fitting[1].value / best.value)} as much"
        )
    drop = best.pair.value("accuracy_drop_points")
    if best is not full and best.pair.predicted is not None:
        known = f"{drop:.3g} points" if drop is not None else "unknown"
        sentence += f"; accuracy given up: {known}"
    return sentence + "."


def known_accuracy(ranked: Sequence[Ranked]) -> tuple[str, ...]:
    """Say what is best among methods with accuracy evidence, where the verdict's has none."""
    if not ranked:
        return ()
    members = _main_place(ranked)
    fitting = [r for r in members if r.rank is not None]
    known = [r for r in fitting if r.pair.value("accuracy_drop_points") is not None]
    if not known or known[0] is fitting[0]:
        return ()
    best, namer = known[0], Namer([r.pair for r in members])
    text = AXES[best.metric]
    drop = best.pair.value("accuracy_drop_points") or 0.0
    return (
        f"Of the methods with accuracy evidence there, {_name(best, namer)} "
        f"{_BEST[best.metric]}: {text.format(best.value or 0.0)}{_PER[best.metric]}, "
        f"{drop:.3g} points given up.",
    )


def margins(ranked: Sequence[Ranked]) -> tuple[Margin, ...]:
    """Best against second at every point with two methods that fit."""
    places: dict[tuple[str, ...], list[Ranked]] = defaultdict(list)
    for r in ranked:
        if r.rank is not None:
            places[r.place].append(r)
    found = []
    for members in places.values():
        namer = Namer([r.pair for r in members])
        others = [m for m in members[1:] if _name(m, namer) != _name(members[0], namer)]
        if not others or not members[0].value or others[0].value is None:
            continue
        best, second = members[0], others[0]
        found.append(
            Margin(
                place=point(
                    best.pair.key,
                    ("context_tokens", "batch", *(("model",) if best.place[0] else ()), "gpu"),
                ),
                best=_name(best, namer),
                second=_name(second, namer),
                metric=best.metric,
                apart_fraction=(second.value or 0.0) / (best.value or 1.0) - 1.0,
                is_settled=_is_settled(best, second),
            )
        )
    return tuple(found)


_BEST = {
    "usd_per_million_output_tokens": "costs least",
    "tpot_s": "decodes fastest",
    "ttft_s": "answers first",
    "state_bytes": "holds the smallest state",
}
_PER = {
    "usd_per_million_output_tokens": " per million output tokens",
    "tpot_s": " per token",
    "ttft_s": " to the first token",
    "state_bytes": "",
}


def _metric_of(members: Sequence[Pair]) -> str:
    timed = [p for p in members if not does_not_fit(p)] or list(members)
    for metric in RANKED_BY:
        if all(value_of(p, metric) is not None for p in timed):
            return metric
    return "tpot_s"


def _missing(pair: Pair, metric: str) -> tuple[bool, float]:
    value = value_of(pair, metric)
    return value is None, value if value is not None else 0.0


def _main_place(ranked: Sequence[Ranked]) -> list[Ranked]:
    places: dict[tuple[str, ...], list[Ranked]] = defaultdict(list)
    for r in ranked:
        places[r.place].append(r)

    def weight(members: list[Ranked]) -> tuple[int, float, float]:
        key = members[0].pair.key
        context, batch = key.number("context_tokens"), key.number("batch")
        return len(members), context or 0.0, batch or 0.0

    return max(places.values(), key=weight)


def _where(members: Sequence[Ranked]) -> str:
    key = members[0].pair.key
    parts = [f"At {tokens(key.number('context_tokens'))} tokens of context"]
    parts.append(f"and batch {key.number('batch') or 1:.0f}")
    if key.text("gpu"):
        parts.append(f"on {point(key, ('gpu',))}")
    if key.text("model") and len({r.pair.key.text("model") for r in members}) == 1:
        parts.append(f"with {point(key, ('model',))}")
    return " ".join(parts) + ","


def _name(r: Ranked, namer: Namer) -> str:
    level = r.pair.key.text("level")
    return f"{namer(r.pair)} ({level})" if level else namer(r.pair)


def _against_full(best: Ranked, full: Ranked) -> str:
    if full.rank is None and does_not_fit(full.pair):
        return "; the full cache does not fit"
    if not full.value or not best.value:
        return ""
    return f"; the full cache takes {times(full.value / best.value)} as much"


def times(ratio: float) -> str:
    """A ratio in words: 1.7x."""
    return f"{ratio:.3g}x"


def _is_settled(best: Ranked, second: Ranked) -> bool | None:
    """Whether the best at its worst still beats the second at its best; None without intervals."""
    stem = "ttft" if best.metric == "ttft_s" else "tpot"
    worst = best.pair.value(f"{stem}_high_s")
    luckiest = second.pair.value(f"{stem}_low_s")
    if best.metric == "state_bytes":
        return True
    return None if worst is None or luckiest is None else worst < luckiest
