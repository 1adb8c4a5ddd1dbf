"""Who executes: the accounting rules of engines that decide memory and launch overhead.

Data: ``costmodel/data/engines.toml``, every number with its source. An engine says how it keeps
the cache, how long a prompt chunk it prefills, and how it starts kernels; kernel speeds belong to
kernel families in the hardware profile.
"""

import functools
import tomllib
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

from costmodel.errors import UnknownNameError
from costmodel.files import DATA
from costmodel.in_situ import InSitu, in_situ


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Rules of one engine.

    kv_growth             "paged" (blocks of ``block_tokens``), "preallocated" (room for prompt and
                          output from the start) or "cat" (a new, longer tensor every step)
    best_kv_growth        the same of its best form (level "ideal"); "": it is the same
    prefill_chunk_tokens  most prompt tokens in one forward pass; 0: the whole prompt at once
    decode_graph          decode replays a captured graph, so the host does not limit it
    host_launch_s         host time per kernel start when there is no graph (low, mid, high)
    step_overhead_s       host time per step besides (scheduler, sampling) (low, mid, high)
    elementwise_launches  kernels one layer starts between its matmuls (norms, rotary, activation,
                          residuals): few where they are fused, many in eager Python
    reserved_bytes        device memory beside tensors: context, workspaces (one GPU / several)
    mlp_alive             elements alive at the widest point of a gated MLP: (per unit of its width,
                          per unit of the model's); one width less without a gate
    attention_alive       what attention over a prompt holds of every token counts for the peak too:
                          the layer's input and its norm, q, k, v (and gate) as projected, q and k
                          as rotated, the output; more than an MLP where that is narrow
    kernels               whose fitted kernel families time its operations; "": none, the prior
    in_situ               what becomes of those kernels inside a pass; None: they run alone
    fused_dequantise      attention kernels read packed caches directly; False: the cache is
                          unpacked into a copy before it is attended, even at level "ideal"
    fused_kernels         runs this project's own kernels (``costmodel.fused_kernels``)
    score_block_tokens    queries scored together where a method needs more of the scores than a
                          fused kernel gives: masked pairs of a block are computed too; 0: kernels
                          that compute only the pairs that exist
    fixed_state_layout    "exact": (kernel-1) convolution columns and W window tokens;
                          "transformers": kernel columns and W-1 window tokens
    """

    name: str
    title: str
    kv_growth: Literal["paged", "preallocated", "cat"]
    best_kv_growth: Literal["", "preallocated"] = ""
    block_tokens: int = 1
    prefill_chunk_tokens: int = 0
    decode_graph: bool
    host_launch_s: tuple[float, float, float]
    step_overhead_s: tuple[float, float, float]
    elementwise_launches: float
    reserved_bytes: tuple[float, float]
    mlp_alive: tuple[float, float] = (3.0, 4.0)
    attention_alive: bool = False
    fused_dequantise: bool = True
    fused_kernels: bool = False
    score_block_tokens: int = 0
    fixed_state_layout: Literal["exact", "transformers"] = "exact"
    kernels: str = ""
    in_situ: InSitu | None = None
    sources: tuple[str, ...] = ()


#: Engine whose rules hold for one that only a calibration names.
OWN_RULES = "vllm"


@functools.cache
def _table() -> dict[str, Any]:
    text = (DATA / "engines.toml").read_text("utf-8")
    return tomllib.loads(text)


def engine_names() -> list[str]:
    """Names of all engines."""
    return sorted(_table())


@functools.cache
def load_engine(name: str) -> Engine:
    """The engine of that name; raises ``UnknownNameError``."""
    table = _table()
    key = name.strip().lower()
    if key not in table:
        raise UnknownNameError("engine", name, table)
    row = dict(table[key])
    for field in ("host_launch_s", "step_overhead_s", "reserved_bytes", "mlp_alive", "sources"):
        if field in row:
            row[field] = tuple(row[field])
    return Engine(name=key, **row)


def at_best(engine: Engine) -> Engine:
    """The same engine in its best form."""
    return replace(engine, kv_growth=engine.best_kv_growth) if engine.best_kv_growth else engine


def in_passes(engine: Engine) -> Engine:
    """The same engine, its operations timed by fitted kernels as they run inside passes."""
    return replace(engine, kernels=engine.name, in_situ=in_situ())


def engine_of(name: str, own: Collection[str] = ()) -> Engine:
    """The engine of that name, or one that only a profile's own families know (``own``): its
    memory is kept by vLLM's rules.
    """
    key = name.strip().lower()
    if key in own and key not in _table():
        rules = load_engine(OWN_RULES)
        return replace(rules, name=key, title=f"{key}, memory by the rules of {rules.name}")
    return load_engine(name)
