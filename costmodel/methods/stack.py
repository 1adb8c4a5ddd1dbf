"""One or several methods as one: the only thing that layout code and results talk to.

Methods compose where their stages do not overlap, and act in the order prompt, prefill, evict,
store: LLMLingua-2 shortens the prompt that KIVI then quantises; MInference attends it sparsely;
SnapKV drops tokens and a quantiser stores those that are left. A mixer that no method covers
behaves as the model has it, and so does every point where the budgets hold the whole context.
"""

from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np

from costmodel.architecture import Architecture, MixerGroup
from costmodel.errors import NotApplicableError
from costmodel.fused_kernels import fused_step
from costmodel.methods.base import STAGE_ORDER, AbstractMethod, Mask, State, within_pass
from costmodel.mixers import AbstractMixer, Attention
from costmodel.operation import Array, Operation, Operations
from costmodel.workload import Point


@dataclass(frozen=True, slots=True)
class MethodStack:
    """1..n methods; those whose stages overlap are refused by every model (``refusal``)."""

    methods: tuple[AbstractMethod, ...]

    def __post_init__(self) -> None:
        if not self.methods:
            raise NotApplicableError("a stack needs at least one method; the plain one is full")
        if self.conflict is None:
            order = sorted(
                self.methods, key=lambda m: min(map(STAGE_ORDER.index, m.STAGES), default=0)
            )
            object.__setattr__(self, "methods", tuple(order))

    @property
    def conflict(self) -> str | None:
        """Why the methods do not compose, or None."""
        if len(self.methods) == 1:
            return None
        for i, method in enumerate(self.methods):
            if not method.STAGES:
                return f"{method.NAME} changes nothing and composes with nothing; leave it out"
            for other in self.methods[:i]:
                shared = [s for s in STAGE_ORDER if s in method.STAGES & other.STAGES]
                if shared:
                    return (
                        f"{other.NAME} and {method.NAME} do not compose: both take the stage "
                        f"{', '.join(map(repr, shared))}. A composition needs different stages "
                        f"({', '.join(STAGE_ORDER)})"
                    )
        return None

    # What results print ----------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Bare name; ``a+b`` for compositions."""
        return "+".join(m.NAME for m in self.methods)

    @property
    def parameters(self) -> dict[str, object]:
        """All parameters with their values; of a composition by method name."""
        if len(self.methods) == 1:
            return self.methods[0].parameters
        return {m.NAME: m.parameters for m in self.methods}

    @property
    def spec(self) -> str:
        """What can be pasted back: canonical, only the parameters that differ from the defaults."""
        return "+".join(_spec(m) for m in self.methods)

    def kv_dtype(self, dtype: str) -> str:
        """Storage type of the bulk of the cache; ``dtype`` where no method changes it."""
        stored = [m.STORES.format(**m.parameters) for m in self.methods if m.STORES]
        return stored[-1] if stored else dtype

    def resolved(self, context_tokens: int) -> Self:
        """With budgets as plain numbers for one context (``parameters`` of the result are those
        that JSON prints).
        """
        tokens, out = context_tokens, []
        for method in self.methods:
            out.append(method.resolved(tokens))
            tokens = int(method.prompt_tokens(tokens))
        return replace(self, methods=tuple(out))

    def refusal(self, architecture: Architecture) -> str | None:
        """Why it cannot run on this model, or None."""
        if self.conflict is not None:
            return self.conflict
        return next((r for m in self.methods if (r := m.refusal(architecture)) is not None), None)

    def equals_full(self, context_tokens: Array, architecture: Architecture | None = None) -> Mask:
        """Where every budget holds the whole context, elementwise. Shape: that of the context."""
        n_kv = None
        if architecture is not None:
            n_kv = max((g.n_kv_layers for g in architecture.mixer_groups), default=0)
        tokens = self.prompt_tokens(np.asarray(context_tokens, dtype=np.float64))
        result: Mask = np.ones(np.shape(context_tokens), dtype=bool)
        for m in self.methods:
            result = np.logical_and(result, m.equals_full(tokens, tokens, n_kv))
        return result

    # Prompt ----------------------------------------------------------------------------------

    def prompt_tokens(self, prompt_tokens: Array) -> Array:
        """Tokens that reach the model."""
        for method in self.methods:
            prompt_tokens = method.prompt_tokens(prompt_tokens)
        return prompt_tokens

    def prompt_operations(self, point: Point) -> Operations:
        """Work before the model sees the prompt, once per sequence batch (not per layer);
        ``point.prompt_tokens`` is the original length.
        """
        return tuple(op for m in self.methods for op in m.prompt_operations(point))

    def prompt_weights_bytes(self) -> float:
        """Weights of helper models, resident beside the model's own."""
        return sum(m.prompt_weights_bytes() for m in self.methods)

    # Cache -----------------------------------------------------------------------------------

    def covers(self, mixer: AbstractMixer) -> bool:
        """Whether any method changes this mixer."""
        return any(m.covers(mixer) for m in self.methods)

    def state(self, group: MixerGroup, point: Point) -> State:
        """Bytes of the group's layers, summed, by tier."""
        evict, store = self._evict(group), self._store(group)
        if store is not None:
            return _either(store, group, self._kept(evict, group, point))
        if evict is not None:
            return _either(evict, group, point)
        return _native_state(group, point)

    def fed_tokens(self, point: Point) -> float:
        """Prompt tokens of a sequence fed at once by the method with the smallest chunks; 0: as the
        engine does.
        """
        return min((n for m in self.methods if (n := m.fed_tokens(point))), default=0.0)

    def prefill(self, group: MixerGroup, point: Point) -> Operations:
        """Operations of one layer between the projections, over the prompt."""
        operations: Operations = within_pass(group.mixer.prefill(point), point)
        after: Operations = ()
        inner = replace(point, cached_tokens=point.prompt_tokens)
        for method in self._covering(group):
            full = _is_full(method, group, inner)
            operations = _choose(
                full, operations, method.prefill_attention(group, point, operations)
            )
            after += _choose(full, (), method.after_prefill(group, inner))
            if _only_evicts(method):
                left = method.tokens_left(group, inner)
                inner = replace(inner, prompt_tokens=left, cached_tokens=left)
        return operations + after

    def decode(self, group: MixerGroup, point: Point) -> Operations:
        """Operations of one layer in the step that reads ``point.cached_tokens`` tokens."""
        evict, store = self._evict(group), self._store(group)
        if store is not None:
            point = self._kept(evict, group, point)
        method = store or evict
        if method is None:
            return _native_step(group.mixer, point)
        full = _is_full(method, group, point)
        native = _native_step(group.mixer, point) if np.any(full) else ()
        return _choose(full, native, method.decode(group, point))

    def _covering(self, group: MixerGroup) -> tuple[AbstractMethod, ...]:
        return tuple(m for m in self.methods if m.covers(group.mixer))

    def _evict(self, group: MixerGroup) -> AbstractMethod | None:
        return next((m for m in self._covering(group) if _only_evicts(m)), None)

    def _store(self, group: MixerGroup) -> AbstractMethod | None:
        return next((m for m in self._covering(group) if "store" in m.STAGES), None)

    @staticmethod
    def _kept(evict: AbstractMethod | None, group: MixerGroup, point: Point) -> Point:
        """The point a store method sees behind an evicting one."""
        if evict is None:
            return point
        return replace(
            point,
            prompt_tokens=evict.tokens_left(group, point.at(point.prompt_tokens)),
            cached_tokens=evict.tokens_left(group, point),
            reserved_tokens=evict.tokens_left(group, point.at(point.reserved_tokens)),
        )


def _only_evicts(method: AbstractMethod) -> bool:
    return len(method.STAGES) == 1 and "evict" in method.STAGES


def _is_full(method: AbstractMethod, group: MixerGroup, point: Point) -> Mask:
    return method.equals_full(point.prompt_tokens, point.cached_tokens, group.n_kv_layers)


def _native_step(mixer: AbstractMixer, point: Point) -> Operations:
    """The mixer's own step; a growing cache of tokens is what fused kernels read."""
    first, *others = mixer.decode(point)
    if not isinstance(mixer, Attention) or mixer.max_kv_tokens() is not None:
        return (first, *others)
    return (*fused_step(point, "attention16", first), *others)


def _native_state(group: MixerGroup, point: Point) -> State:
    return State(group.n_layers * group.mixer.state_bytes(point))


def _either(method: AbstractMethod, group: MixerGroup, point: Point) -> State:
    """The method's state, and the model's own where the budgets hold everything."""
    full = _is_full(method, group, point)
    if np.all(full):
        return _native_state(group, point)
    state = method.state(group, point)
    if not np.any(full):
        return state
    native = _native_state(group, point).device
    allocated = None
    if state.allocated is not None:  # NaN: the engine's own rule, as for any native cache
        allocated = np.where(full, np.nan, state.allocated)
    return State(np.where(full, native, state.device), np.where(full, 0.0, state.host), allocated)


def _choose(full: Mask, native: Operations, changed: Operations) -> Operations:
    """``native`` where ``full``, else ``changed``; mixed arrays get both, counted 0 or 1."""
    if np.all(full):
        return native
    if not np.any(full):
        return changed
    share = np.asarray(full, dtype=np.float64)
    return tuple(_scaled(op, share) for op in native) + tuple(
        _scaled(op, 1.0 - share) for op in changed
    )


def _scaled(operation: Operation, share: Array) -> Operation:
    return replace(
        operation,
        count=operation.count * share,
        transient_bytes=operation.transient_bytes * share,
    )


def _spec(method: AbstractMethod) -> str:
    changed = [
        f"{f.name}={_text(getattr(method, f.name))}"
        for f in fields(method)
        if getattr(method, f.name) != f.default
    ]
    return f"{method.NAME}:{','.join(changed)}" if changed else method.NAME


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
