"""What a plan gives up in accuracy, and whether the floor lets it pass.

Evidence is ``costmodel.quality``'s. Here it is asked at the workload's own prompt lengths, and,
only where the user allows it, taken from another model of the same attention type and size class.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from costmodel.architecture import Architecture
from costmodel.errors import LccostError
from costmodel.methods.stack import MethodStack
from costmodel.mixers import Attention
from costmodel.planning.spec import AccuracyFloor
from costmodel.quality import accuracy, rows
from costmodel.registry import load_architecture

#: Evidence must reach the prompt that this share of requests stay within.
PERCENTILE = 95.0
#: Models whose sizes differ by at most this factor are of one class.
SIZE_CLASS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp:
    """``drop_points`` against the same model uncompressed; None: unknown, and ``source`` says why.

    refusal   why the floor does not let it pass, or None
    """

    drop_points: float | None
    source: str
    analogy: bool = False
    refusal: str | None = None


def given_up(
    architecture: Architecture, stack: MethodStack, prompts: np.ndarray, floor: AccuracyFloor
) -> GivenUp:
    """The largest drop at the median prompt and at the P95 one."""
    family = floor.task_family or "average"
    found = [
        _at(architecture, stack, float(context), family, floor.allow_analogy)
        for context in np.unique(np.round(np.percentile(prompts, (50.0, PERCENTILE))))
    ]
    worst = max(found, key=lambda x: np.inf if x.drop_points is None else x.drop_points)
    return GivenUp(
        drop_points=worst.drop_points,
        source=worst.source,
        analogy=worst.analogy,
        refusal=_refusal(worst, floor, family),
    )


def _refusal(worst: GivenUp, floor: AccuracyFloor, family: str) -> str | None:
    if worst.drop_points is None:
        if floor.allow_unknown:
            return None
        return (
            f"accuracy unknown: {worst.source.removeprefix('unknown').strip(' :')}; "
            "allow_unknown = true ranks it anyway"
        )
    if floor.max_drop_points is None or worst.drop_points <= floor.max_drop_points:
        return None
    return (
        f"gives up {worst.drop_points:.1f} points ({family}), more than the "
        f"{floor.max_drop_points:g} allowed"
    )


def _at(
    architecture: Architecture, stack: MethodStack, context: float, family: str, analogy: bool
) -> GivenUp:
    parameters = stack.resolved(int(context)).parameters
    drop, source = accuracy(architecture.name, stack.name, parameters, context, task_family=family)
    if drop is not None or not analogy:
        return GivenUp(drop_points=drop, source=source)
    others = []
    for name in _evaluated(stack):
        if name == architecture.name or not _alike(architecture, name):
            continue
        other, why = accuracy(name, stack.name, parameters, context, task_family=family)
        if other is not None:
            others.append((other, f"by analogy with {name}: {why}"))
    if not others:
        return GivenUp(drop_points=None, source=f"{source}; no model like it was either")
    drop, source = max(others)
    return GivenUp(drop_points=drop, source=source, analogy=True)


def _evaluated(stack: MethodStack) -> Iterable[str]:
    """Bundled models that some figure of these methods is about."""
    return dict.fromkeys(row.model for m in stack.methods for row in rows(m.NAME) if row.model)


def _alike(architecture: Architecture, name: str) -> bool:
    try:
        other = load_architecture(name)
    except LccostError:
        return False
    ratio = architecture.n_parameters / other.n_parameters
    same_size = 1 / SIZE_CLASS <= ratio <= SIZE_CLASS
    return same_size and _attention_type(architecture) == _attention_type(other)


def _attention_type(architecture: Architecture) -> frozenset[str]:
    """Kinds of the mixers; full attention is MHA, GQA or MQA, with or without a window."""
    kinds = set()
    for group in architecture.mixer_groups:
        mixer = group.mixer
        kind = mixer.KIND
        if isinstance(mixer, Attention):
            shared = mixer.n_heads // max(1, mixer.n_kv_heads)
            heads = "mha" if shared == 1 else "mqa" if mixer.n_kv_heads == 1 else "gqa"
            kind = f"{heads}{'-window' if mixer.max_kv_tokens() else ''}"
        kinds.add(kind)
    return frozenset(kinds)
