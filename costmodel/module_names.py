"""Which modules of a checkpoint a matrix stands for, and whether a list of names holds them.

Quantised checkpoints say by module path what they leave alone: plain names ("lm_head", "gate"),
paths with or without layer numbers ("model.layers.0.self_attn"), shell wildcards
("model.layers.*.self_attn") and regular expressions ("re:.*self_attn.*"). A :class:`Linear` knows
its role and name; here it gets the paths that the model families give such a matrix.

Patterns come from a file that may be hostile: expressions that could backtrack without end are
refused.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence

from costmodel.errors import ConfigError
from costmodel.mixers.base import Linear

#: Where a block keeps a matrix of this role, over the families.
_CONTAINERS = {
    "attention": ("self_attn", "attention", "attn"),
    "mixer": ("linear_attn", "mamba", "mixer", "temporal_block", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn"),
    "expert": ("mlp.experts.0", "mlp.experts", "block_sparse_moe.experts.0", "ffn.experts.0"),
    "shared_expert": (
        "mlp.shared_experts",
        "mlp.shared_expert",
        "shared_mlp",
        "ffn.shared_experts",
    ),
}
#: What checkpoints call the parts of a matrix that our architectures fuse.
_LEAVES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj_with_mqa"),
    "kv_a_proj": ("kv_a_proj_with_mqa", "kv_a_proj"),
    "gate_up_proj": ("gate_proj", "up_proj", "gate_up_proj"),
    "experts_gate_up": ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"),
    "experts_up": ("up_proj", "w1"),
    "experts_down": ("down_proj", "w2"),
}
_MAX_QUANTIFIERS = 6
_MAX_PATTERN = 300


def module_paths(linear: Linear, layer: int) -> tuple[str, ...]:
    """Paths of the matrix in one layer, such as ``model.layers.3.self_attn.q_proj``."""
    leaves = _LEAVES.get(linear.name, (linear.name,))
    containers = _CONTAINERS.get(linear.role, (linear.role,))
    return tuple(
        f"model.layers.{layer}.{container}.{leaf}" for container in containers for leaf in leaves
    )


class Patterns:
    """A list of module names and patterns; empty matches nothing.

    by_layer   whether a pattern names layer numbers, so that layers can differ
    """

    __slots__ = ("_expressions", "_literals", "by_layer", "empty")

    def __init__(self, patterns: Sequence[object]) -> None:
        literals: set[str] = set()
        expressions: list[re.Pattern[str]] = []
        self.by_layer = False
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise ConfigError(
                    f"quantization_config: expected module names, got {str(pattern)[:40]!r}"
                )
            self.by_layer = self.by_layer or any(c.isdigit() for c in pattern)
            if pattern.startswith("re:"):
                expressions.append(_safe_expression(pattern[3:]))
            elif any(c in pattern for c in "*?["):
                expressions.append(_safe_expression(fnmatch.translate(_tail(pattern)), whole=True))
            else:
                literals.add(_tail(pattern))
        self._literals = frozenset(literals)
        self._expressions = tuple(dict.fromkeys(expressions))
        self.empty = not patterns

    def match(self, paths: Iterable[str]) -> bool:
        """Whether any path is named, lies under a named one, or matches an expression."""
        return any(self._match(path) for path in paths)

    def _match(self, path: str) -> bool:
        if self._literals:
            parts = _tail(path).split(".")
            for i in range(len(parts)):
                for j in range(i + 1, len(parts) + 1):
                    if ".".join(parts[i:j]) in self._literals:
                        return True
        tail = _tail(path)
        return any(e.match(path) or e.match(tail) for e in self._expressions)


def _tail(path: str) -> str:
    """A path from its ``layers`` on: what stands before differs between wrappers."""
    at = path.find("layers.")
    return path[at:] if at > 0 and path[at - 1] == "." else path


def _safe_expression(text: str, *, whole: bool = False) -> re.Pattern[str]:
    """Compile, unless it could take exponential or high polynomial time on a short path."""
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", text)
    nested = re.search(r"\)\s*[*+{]", plain) is not None
    if len(text) > _MAX_PATTERN or nested or len(re.findall(r"[*+{]", plain)) > _MAX_QUANTIFIERS:
        raise ConfigError(
            f"quantization_config: pattern {text[:60]!r}: too complex (nested or more than "
            f"{_MAX_QUANTIFIERS} repetitions, or over {_MAX_PATTERN} characters)"
        )
    try:
        # A wildcard names a module; what lies under it is meant too.
        return re.compile(text.removesuffix(r"\Z") + r"(\..*)?$" if whole else text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(f"quantization_config: pattern {text[:60]!r}: {error}") from None
