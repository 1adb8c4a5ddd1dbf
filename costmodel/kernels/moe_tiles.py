"""Which tiles a grouped kernel of experts runs with.

best      the fastest of 16, 32, 64, ... rows, as a tuned library picks it
older     vLLM's fused Triton kernel up to release 0.16: tuned tiles for the shapes it ships a file
          for, else 16 x 32 for as many tokens as experts or fewer, and 64 x 64 beyond
newer     the same kernel since: other shapes take tiles that grow with the tokens of the call

The defaults are those of ``get_default_config`` in vLLM's ``fused_moe.py`` before and after pull
request 34846; the shapes with a file are listed in ``costmodel/data/fused_moe_tuned.json``.

A tile that a default takes for more tokens is tried for fewer as well, and the faster one counts.
What a library would take may be the slower; but a step with fewer tokens is then never priced
above one with more, and the published rows are predicted as well either way.
"""

import functools
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from costmodel.files import DATA
from costmodel.operation import Array

#: Rules, as ``MoeParameters.tile_rule`` holds them.
BEST, OLDER, NEWER = 0.0, 1.0, 2.0
#: Columns and fewest rows of the tiles that are tried for the best one.
TILE_COLUMNS = 128.0
MIN_TILE_ROWS = 16.0
TUNED_COLUMNS = (64.0, 128.0)
#: Tensor rate of the older default over the newer's: its k steps of 32 match fewer than one in a
#: hundred tuned files, and the newer was published as up to twice as fast.
OLDER_SHARE = 0.65
#: Newer defaults: most tokens, rows, columns; the last without a limit.
NEWER_TILES = (
    (32.0, 16.0, 64.0),
    (64.0, 32.0, 64.0),
    (96.0, 32.0, 128.0),
    (512.0, 64.0, 128.0),
    (np.inf, 128.0, 128.0),
)
NEWER_BLOCK_TILES = ((64.0, 16.0, 128.0), (np.inf, 64.0, 128.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Rows and columns; where it may be taken; its tensor rate over that of tuned tiles."""

    rows: float
    columns: float
    allowed: NDArray[np.bool_]
    share: float = 1.0


def tile_rule(kernel: str) -> float:
    """Rule of a kernel by its name in a table."""
    if kernel == "vllm_fused_moe":
        return OLDER
    return NEWER if "tritonexperts" in kernel else BEST


def tiles(
    rule: float,
    tile_rows: float,
    default_share: float,
    shape: tuple[Array, Array, Array],
    hardware: str,
    variant: str,
) -> list[Tile]:
    """Tiles to try. ``shape``: tokens, experts and inner size of this GPU."""
    tokens, experts, inner = (np.asarray(v, dtype=np.float64) for v in shape)
    always = np.ones((), dtype=np.bool_)
    if rule == BEST:
        return [Tile(rows=rows, columns=TILE_COLUMNS, allowed=always) for rows in _rows(tile_rows)]
    tuned = np.zeros(np.broadcast_shapes(experts.shape, inner.shape), dtype=np.bool_)
    for n_experts, n_inner in tuned_shapes(hardware, variant):
        tuned = tuned | ((experts == n_experts) & (inner == n_inner))
    out: list[Tile] = []
    if tuned.any():
        out += [
            Tile(rows=rows, columns=columns, allowed=tuned)
            for rows in _rows(tile_rows)
            for columns in TUNED_COLUMNS
        ]
    if tuned.all():
        return out
    if rule == OLDER:
        share = OLDER_SHARE * default_share
        few = ~tuned & (tokens <= experts)
        out.append(Tile(rows=16.0, columns=32.0, allowed=few, share=share))
        out.append(Tile(rows=64.0, columns=64.0, allowed=~tuned, share=share))
        return out
    for most, rows, columns in NEWER_BLOCK_TILES if variant == "fp8_block" else NEWER_TILES:
        allowed = ~tuned & (tokens <= most)
        if allowed.any():
            out.append(Tile(rows=rows, columns=columns, allowed=allowed, share=default_share))
    return out


@functools.cache
def tuned_shapes(hardware: str, variant: str) -> frozenset[tuple[float, float]]:
    """(Experts, inner size) of a GPU that vLLM ships tuned tiles for."""
    listed = _listed().get(hardware, {}).get(variant, [])
    return frozenset((float(e), float(n)) for e, n in listed)


@functools.cache
def _listed() -> dict[str, dict[str, list[list[int]]]]:
    text = (DATA / "fused_moe_tuned.json").read_text("utf-8")
    listed: dict[str, dict[str, list[list[int]]]] = json.loads(text)["tuned"]
    return listed


def _rows(most: float) -> list[float]:
    """Rows of a tile that are tried."""
    rows = [MIN_TILE_ROWS]
    while rows[-1] < most:
        rows.append(min(2.0 * rows[-1], most))
    return rows
