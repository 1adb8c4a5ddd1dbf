"""Predicted against observed on this CPU, for models that no calibration has seen.

    python benchmarks/cpu_accuracy.py --profile this-cpu.toml --output accuracy.jsonl [--quick]

Measures prefill and decode of a Llama-like, a Mamba-2 and a RecurrentGemma-like model (random
weights, the sizes below), every point twice with all other points in between; then predicts each
point from ``--profile`` (calibrated first if the file does not exist) and prints MAPE, median, p90
and bias per group, beside the noise floor: how far the two measurements of a point differ. Points
that are in the file already are not measured again, so a killed run goes on where it was;
``--report`` only prints. One thread; needs a quiet machine: foreign load is printed.

Shared machines change their own speed. Given two profiles, the first is calibrated before anything
is measured and the second afterwards (where the files do not exist); a prediction is then the mean
of both. A fixed piece of work (``measure.canary``) is timed before and after every measurement,
which is repeated where the two differ by more than a tenth; the steadiest of three tries is kept.
No point is left out: figures over all of them come first, those over points whose two measurements
agree within a tenth are printed beside them, with their number.

The full grid takes 30 to 60 minutes: prefill of 512 to 8k tokens, decode at 1k to 32k, batch 1 and
4, bf16 and fp32, all methods of ``METHODS`` for the Llama-like model. ``--quick`` takes about
eleven: the same models, methods, batches and dtypes, prefill of 512 and 2k tokens (batch 4: bf16
and 512 tokens only; fp32: 512 tokens), decode at 1k and 8k.
"""

import argparse
import itertools
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.predict import predict
from costmodel.registry import architecture_from_config
from costmodel.workload import Workload
from measure.environment import worker_variables
from measure.isolation import run_isolated
from measure.progress import progress
from measure.store import RecordStore

THREADS = 1
#: Sizes no published checkpoint has, large enough for weights not to stay in a cache.
MODELS: dict[str, dict[str, Any]] = {
    "llama-like": {
        "model_type": "llama",
        "hidden_size": 1536,
        "intermediate_size": 4352,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 24576,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": True,
    },
    "mamba2-like": {
        "model_type": "mamba2",
        "hidden_size": 1280,
        "num_heads": 40,
        "head_dim": 64,
        "expand": 2,
        "state_size": 128,
        "n_groups": 1,
        "conv_kernel": 4,
        "chunk_size": 256,
        "num_hidden_layers": 8,
        "vocab_size": 24576,
        "tie_word_embeddings": True,
    },
    "recurrentgemma-like": {
        "model_type": "recurrent_gemma",
        "hidden_size": 1280,
        "intermediate_size": 7680,
        "num_hidden_layers": 6,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "lru_width": 1280,
        "conv1d_width": 4,
        "attention_window_size": 2048,
        "block_types": ["recurrent", "recurrent", "attention"],
        "vocab_size": 24576,
        "tie_word_embeddings": True,
    },
}
METHODS = ("full", "kivi:bits=2", "kivi:bits=4", "streaming_llm", "h2o")
#: The bars, in percent, and what is aimed at.
BARS = {"prefill": (10.0, 5.0), "decode": (15.0, 8.0)}


class Grid(NamedTuple):
    """Tokens of prompts and of caches; h2o's prompts end at 4k; the most tokens of one pass."""

    prefill: tuple[int, ...]
    decode: tuple[int, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    most_prompt_tokens: dict[str, int]


#: Points whose measurements differ by more, in percent, say little about a prediction.
AGREED_PERCENT = 10.0
#: Times a measurement is taken where the machine changes speed meanwhile.
TRIES = 3
FULL = Grid(
    (512, 1024, 2048, 4096, 8192),
    (1024, 4096, 16384, 32768),
    (1, 4),
    ("bf16", "fp32"),
    {"bf16": 4 * 8192, "fp32": 2 * 8192},
)
QUICK = Grid((512, 2048), (1024, 8192), (1, 4), ("bf16", "fp32"), {"bf16": 2048, "fp32": 512})


class Cell(NamedTuple):
    """One point of one phase."""

    model: str
    method: str
    dtype: str
    batch: int
    phase: str
    tokens: int


def cells(grid: Grid) -> Iterator[Cell]:
    """All points, those of one process together."""
    for model, dtype, batch in itertools.product(MODELS, grid.dtypes, grid.batches):
        for method in METHODS if model == "llama-like" else METHODS[:1]:
            for tokens in grid.prefill:
                limit = min(
                    grid.most_prompt_tokens[dtype], batch * 4096 if method == "h2o" else 1 << 30
                )
                if batch * tokens <= limit:
                    yield Cell(model, method, dtype, batch, "prefill", tokens)
            for tokens in grid.decode:
                yield Cell(model, method, dtype, batch, "decode", tokens)


def observe(group: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Measure cells that differ in phase and tokens only; runs in a worker."""
    import torch

    from costmodel.methods.parse import parse_method
    from measure.canary import canary_s
    from measure.engine import TORCH_DTYPES, Decoder, random_weights
    from measure.load import ForeignLoad
    from measure.methods.base import AbstractLayerCache
    from measure.mixers import build_cache
    from measure.reliability import CANARY_FRACTION
    from measure.timing import Budget, Sampler

    torch.set_num_threads(THREADS)
    points = [Cell(*cell) for cell in group]
    first = points[0]
    model = architecture_from_config(MODELS[first.model], first.model)
    dtype, device = TORCH_DTYPES[first.dtype], torch.device("cpu")
    weights = random_weights(model, dtype, device)
    decoder = Decoder(model, weights, n_positions=max(p.tokens for p in points) + 8)
    mixers = [mixer for layer in model.layers for mixer in layer.mixers]
    sampler = Sampler.for_cpu(THREADS)
    found = []
    for point in points:
        caches = [
            build_cache(
                parse_method(point.method),
                mixer,
                batch=point.batch,
                dtype=dtype,
                device=device,
                reserve_tokens=point.tokens + 8,
            )
            for mixer in mixers
        ]
        with_kv = [c for c in caches if isinstance(c, AbstractLayerCache)]
        for index, cache in enumerate(with_kv):
            cache.place(index, len(with_kv), decoder.numerics.rope)
        tokens = torch.randint(
            model.vocab_size,
            (point.batch, point.tokens if point.phase == "prefill" else 1),
            generator=torch.Generator().manual_seed(0),
        )
        if point.phase == "prefill":
            budget = Budget(seconds=2.0, min_samples=3, least_samples=2, min_warmups=1)

            def before(caches: list[Any] = caches) -> None:
                for cache in caches:
                    cache.clear()

            def call(caches: list[Any] = caches, tokens: Any = tokens) -> None:
                decoder.prefill(tokens, caches)
        else:
            budget = Budget(seconds=0.8, min_samples=7)
            for cache in caches:
                cache.fill(point.tokens)
            snapshots = [cache.snapshot() for cache in caches]

            def before(caches: list[Any] = caches, snapshots: list[Any] = snapshots) -> None:
                for cache, snapshot in zip(caches, snapshots, strict=True):
                    cache.restore(snapshot)

            def call(caches: list[Any] = caches, tokens: Any = tokens) -> None:
                decoder.decode(tokens, caches)

        tries: list[dict[str, Any]] = []
        while not tries or (tries[-1]["canary_change"] > CANARY_FRACTION and len(tries) < TRIES):
            load, canary = ForeignLoad(), canary_s()
            timing = sampler.time(call, before=before, budget=budget)
            tries.append(
                {
                    "seconds": timing.statistics.median_s,
                    "spread": timing.statistics.iqr_fraction,
                    "samples": timing.statistics.n,
                    "canary_s": canary,
                    "canary_change": abs(canary_s() / canary - 1.0),
                    "foreign_cores": load.foreign_cores(),
                }
            )
        steadiest = min(tries, key=lambda t: t["canary_change"])
        found.append({**steadiest, "tries": len(tries)})
    return found


def measure(grid: Grid, store: RecordStore, only: str) -> None:
    """Measure what the file lacks: everything once, then everything again."""
    done = {(Cell(*r["cell"]), r["round"]) for r in store.records()}
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in cells(grid):
        if only in "/".join(map(str, cell)):
            groups[(*cell[:4],)].append(cell)
    with progress("accuracy", 2 * len(groups)) as report:
        for turn, (key, group) in itertools.product((0, 1), groups.items()):
            missing = [c for c in group if (c, turn) not in done]
            if missing:
                outcome = run_isolated(
                    "cpu_accuracy:observe",
                    ([tuple(cell) for cell in missing],),
                    timeout_s=3600.0,
                    variables=worker_variables(THREADS),
                )
                if outcome.status != "ok":
                    sys.exit(f"{key}: {outcome.status}: {outcome.message}")
                for cell, observed in zip(missing, outcome.value, strict=True):
                    store.append({"cell": list(cell), "round": turn, **observed})
            report(" ".join(map(str, key)))


class Compared(NamedTuple):
    """A point with both measurements and its prediction, in seconds."""

    cell: Cell
    observed: tuple[float, ...]
    predicted: float
    foreign_cores: float
    canary_s: float
    canary_change: float

    @property
    def error(self) -> float:
        """Relative error against the mean of the measurements, in percent."""
        return 100 * (self.predicted / float(np.mean(self.observed)) - 1)

    @property
    def noise(self) -> float:
        """Difference of the two measurements over their mean, in percent; NaN with one."""
        if len(self.observed) < 2:
            return float("nan")
        return 100 * abs(self.observed[0] - self.observed[1]) / float(np.mean(self.observed))

    @property
    def agreed(self) -> bool:
        """Whether two measurements agree."""
        return self.noise <= AGREED_PERCENT


def compared(store: RecordStore, profiles: Sequence[HardwareProfile]) -> list[Compared]:
    """Join measurements with predictions."""
    by_cell: dict[Cell, dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in store.records():
        by_cell[Cell(*record["cell"])][record["round"]] = record
    out = []
    for cell, rounds in by_cell.items():
        architecture = architecture_from_config(MODELS[cell.model], cell.model)
        workload = Workload.of(cell.batch, cell.tokens, 8)
        metric = "ttft_s" if cell.phase == "prefill" else "tpot_s"
        predicted = [
            predict(architecture, cell.method, workload, x, dtype=cell.dtype, solve=False)[metric]
            for x in profiles
        ]
        out.append(
            Compared(
                cell,
                tuple(r["seconds"] for _, r in sorted(rounds.items())),
                float(np.mean(predicted)),
                max(r["foreign_cores"] for r in rounds.values()),
                float(np.mean([r["canary_s"] for r in rounds.values()])),
                max(r["canary_change"] for r in rounds.values()),
            )
        )
    return out


def line(name: str, rows: Sequence[Compared]) -> str:
    """Figures of one group."""
    errors = np.array([r.error for r in rows])
    noise = [r.noise for r in rows if not np.isnan(r.noise)]
    size = np.abs(errors)
    floor = f"{np.mean(noise):6.1f} {np.max(noise):6.1f}" if noise else f"{'-':>6} {'-':>6}"
    return (
        f"{name:44} {len(rows):4} {size.mean():6.1f} {np.median(size):6.1f} "
        f"{np.percentile(size, 90):6.1f} {errors.mean():+6.1f} {floor}"
    )


def show(rows: Sequence[Compared], profiles: Sequence[HardwareProfile], worst: int) -> bool:
    """Print everything; whether both bars are met."""
    for x in profiles:
        print(f"profile {x.title}, {x.calibration.get('kind')} of {x.calibration.get('date')}")
    print(
        f"{'% per group':44} {'n':>4} {'MAPE':>6} {'median':>6} {'p90':>6} {'bias':>6} noise, max"
    )
    met = True
    for phase, (bar, aim) in BARS.items():
        chosen = [r for r in rows if r.cell.phase == phase]
        if not chosen:
            continue
        groups: dict[str, list[Compared]] = defaultdict(list)
        for r in chosen:
            groups[f"{phase} {r.cell.model} {r.cell.method} {r.cell.dtype}"].append(r)
        for name, group in groups.items():
            print(line(name, group))
        print(line(f"{phase}: all (must {bar:g}, aim {aim:g})", chosen))
        agreed = [r for r in chosen if r.agreed]
        if agreed:
            print(line(f"{phase}: measured alike, within {AGREED_PERCENT:g} %", agreed))
        met &= float(np.mean([abs(r.error) for r in chosen])) <= bar
    print("\nfarthest from the prediction:")
    for r in sorted(rows, key=lambda r: -abs(r.error))[:worst]:
        observed = " ".join(f"{1e3 * x:.2f}" for x in r.observed)
        print(
            f"  {r.error:+6.1f} %  {' '.join(map(str, r.cell))}: "
            f"{1e3 * r.predicted:.2f} ms, observed {observed} ms"
        )
    print(f"\nother work used up to {max(r.foreign_cores for r in rows):.2f} cores meanwhile")
    names = ("canary_s", "canary_after_s")
    then = ", ".join(f"{1e3 * float(x.calibration[n]):.1f}" for x in profiles for n in names)
    now = [r.canary_s for r in rows]
    print(
        f"canary {then} ms before and after calibrating; when measured median "
        f"{1e3 * float(np.median(now)):.1f} ms, {1e3 * min(now):.1f} to {1e3 * max(now):.1f}; "
        f"it moved by up to {max(r.canary_change for r in rows):.0%} in a measurement that was kept"
    )
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", type=Path, nargs="+", default=[Path("out/this-cpu.toml")])
    parser.add_argument("--output", type=Path, default=Path("out/cpu_accuracy.jsonl"))
    parser.add_argument("--quick", action="store_true", help="a coarse grid")
    parser.add_argument("--only", default="", help="cells whose model/method/... contain this")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--worst", type=int, default=10)
    options = parser.parse_args()
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    store = RecordStore(options.output)
    if not options.report:
        _calibrate_missing(options.profile[:1])
        measure(QUICK if options.quick else FULL, store, options.only)
        _calibrate_missing(options.profile[1:])
    profiles = [load_hardware(x) for x in options.profile]
    rows = compared(store, profiles)
    if not rows:
        sys.exit(f"{options.output} holds no measurement")
    sys.exit(0 if show(rows, profiles, options.worst) else 5)


def _calibrate_missing(paths: Sequence[Path]) -> None:
    from measure.calibrate import calibrate

    for path in paths:
        if not path.exists():
            calibrate("cpu", output=path, threads=THREADS)


if __name__ == "__main__":
    main()
