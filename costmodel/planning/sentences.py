"""A plan in words: what binds and what would move it, how far the closed form was off, what to
run.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from costmodel.errors import LccostError
from costmodel.hardware import known_prices, load_hardware
from costmodel.methods.parse import parse_method
from costmodel.planning.plan import Plan
from costmodel.planning.spec import PlanSpec

Row = Mapping[str, Any]

#: What each number means, printed once with every plan.
DEFINITIONS = (
    "TTFT: arrival to first token, queue included. TPOT: (E2E - TTFT) / (n - 1) of one request. "
    "ITL: every gap between consecutive tokens. E2E: arrival to last token.",
    "goodput: requests per second that meet every limit themselves.",
    "fragile (*): the 95 % interval of a percentile reaches beyond its limit.",
    "USD per million tokens: the fleet's cost over prompt and answer tokens together; in and out "
    "share it by the seconds in which prompts and answers keep the fleet busy.",
    "J/token: joules of decode per generated token; of the fleet: all joules, prefill and idle "
    "GPUs included, hosts and cooling not.",
    "KV use: mean share of the state pool; headroom: load that still holds, above the planned one, "
    "searched for the first three plans of one kind of server.",
)


def verdict(plan: Plan) -> str:
    """The answer in one sentence."""
    if plan.feasible:
        best = plan.feasible[0]
        usd = "" if best["usd_per_hour"] is None else f", {best['usd_per_hour']:.2f} USD/h"
        text = (
            f"{best['gpus']} x {best['gpu']} with {best['method_spec']} serve {best['model']}"
            f"{usd}; it holds {_holds(best)}."
        )
        if best["fragile"]:
            text += (
                " It is fragile: the interval of a percentile reaches beyond its limit, so another "
                "draw of the same load may break it."
            )
        return text
    near = plan.nearest
    if near is None:
        return "No plan meets the objectives: every candidate is out before it is simulated."
    gpus = near["gpus"] or near["bound_gpus"]
    what = f"{gpus} x {near['gpu']}" if gpus else near["gpu"]
    split = f" {split_of(near)}" if split_of(near) != "tp1" else ""
    return (
        f"No plan meets the objectives. Nearest: {what}{split} with {near['method_spec']} for "
        f"{near['model']}: {near['reason']}."
    )


def _holds(row: Row) -> str:
    if len(row["pools"]) == 1:
        return f"at {row['replicas']} and at {row['replicas'] + 1} replicas"
    parts = [f"{p['replicas']} x {p['gpu']}" + _role(p) for p in row["pools"]]
    more = "of either pool" if row["pools"][0]["role"] == "prefill" else "of every kind"
    return f"with {' and '.join(parts)}, and with one more {more}"


def _role(pool: Row) -> str:
    return f" for {pool['role']}" if pool["role"] in ("prefill", "decode") else ""


def split_of(row: Row) -> str:
    """Degrees of parallelism: ``tp2 pp2``."""
    degrees = [f"{k}{row.get(k)}" for k in ("pp", "ep", "cp") if (row.get(k) or 1) > 1]
    return " ".join([f"tp{row['tp']}", *degrees])


def binding_sentences(rows: Sequence[Row]) -> list[str]:
    """Per model and GPU, at its best-ranked split: what binds without any method, and whether the
    methods help.
    """
    out = []
    splits: dict[tuple[str, str], tuple[str, str, str]] = {}
    for r in rows:
        if r["binding"]:
            splits.setdefault((r["model"], r["gpu"]), (r["model"], r["gpu"], split_of(r)))
    for key in splits.values():
        group = [r for r in rows if (r["model"], r["gpu"], split_of(r)) == key and r["binding"]]
        base = next((r for r in group if r["method"] == "full"), group[0])
        out.append(_binding(base, group, named=len({m for m, _ in splits}) > 1))
    return out


def _binding(base: Row, group: Sequence[Row], *, named: bool) -> str:
    b = base["binding"]
    where = f"{base['gpu']} for {base['model']}" if named else base["gpu"]
    where += "" if split_of(base) == "tp1" else f" {split_of(base)}"
    prefill, decode, pool = b["prefill_s"], b["decode_s"], b["kv_pool_s"]
    text = (
        f"Binds on {where} with {base['method_spec']}: {base['binds']} ({prefill:.3g} s of prefill "
        f"and {decode:.3g} s of decode per request; it fills the whole KV pool for {pool:.3g} s)."
    )
    needs = {r["method_spec"]: _replicas(r) for r in group}
    own = needs[base["method_spec"]]
    fewer = {m: n for m, n in needs.items() if n is not None and own is not None and n < own}
    if fewer:
        least = min(fewer.values())
        best = [m for m, n in fewer.items() if n == least]
        text += f" {', '.join(best)}: {least} replicas instead of {own}."
    elif len(group) > 1 and own is not None:
        others = {r["binds"] for r in group if r is not base}
        if base["binds"] not in others and len(others) == 1:
            text += f" No method here saves a replica: with them {others.pop()} binds."
        else:
            text += f" No method here saves a replica: {_MOVERS[base['binds']]}."
    return text


#: What would make a replica do more, by what binds it.
_MOVERS = {
    "prefill": "prefill binds, and only fewer prompt tokens (prompt compression, a prefix cache) "
    "or sparse prefill would move it",
    "decode": "decode binds, and only fewer bytes a step (a smaller cache, smaller weights) or "
    "more bandwidth would move it",
    "KV pool": "the pool binds, and only a smaller cache, smaller weights or more memory a replica "
    "(tensor parallelism, a larger GPU) would move it",
}


def edge_sentence(rows: Sequence[Row]) -> str | None:
    """What decides how many replicas the best plan needs."""
    row = next((r for r in rows if r["feasible"]), None)
    if row is None or len(row["pools"]) != 1 or row["replicas"] < 2:
        return None
    if row["fewer_breaks"] is not None:
        return f"One replica fewer breaks {limit_title(row['fewer_breaks'])}: latency decides."
    if row["replicas"] == row["bound_replicas"]:
        return "One replica fewer cannot carry the load at all: throughput decides."
    return None


def limit_title(key: str) -> str:
    """``ttft_p99_s`` as people read it."""
    metric, _, rest = key.removesuffix("_s").partition("_p")
    if rest[:1].isdigit():
        return f"{metric.upper()} P{rest.replace('_', '.')}"
    return {"ttft_per_1k_share": "TTFT per 1k tokens", "backlog_s": "the queue"}.get(key, key)


def _replicas(row: Row) -> int | None:
    value = row["replicas"] if row["feasible"] else row["bound_replicas"]
    return None if value is None or (row["reason"] and not row["feasible"]) else int(value)


def gap_sentence(rows: Sequence[Row]) -> str | None:
    """How far the closed form alone would have been off."""
    gaps = [r["bound_gap"] for r in rows if r["feasible"] and r["bound_gap"]]
    if not gaps:
        return None
    best = next(r for r in rows if r["feasible"] and r["bound_gap"])
    return (
        f"Closed form said {best['bound_replicas']} replicas for rank {best['rank']}, simulation "
        f"needs {best['replicas']}; over all simulated plans {min(gaps):.2f} to {max(gaps):.2f} "
        "times."
    )


def tail_sentence(workload: Mapping[str, Any]) -> str | None:
    """The length tail, where it explains a queue."""
    mean, p99 = workload["input_tokens_mean"], workload["input_tokens_p99"]
    if p99 < 3 * mean:
        return None
    return f"Length tail: the P99 prompt is {p99 / mean:.1f} times the mean of {mean:,.0f} tokens."


def pool_sentence(row: Row, workload: Mapping[str, Any]) -> str | None:
    """How much of the pool the longest request can take."""
    share = row.get("largest_share")
    if not share or share < 0.25:
        return None
    return (
        f"On {row['gpu']} with {row['method_spec']} the longest request "
        f"({workload['input_tokens_max']:,} prompt tokens) takes {share:.0%} of the KV pool."
    )


def assumptions(plan: Plan) -> list[str]:
    """What a reader must know before trusting the numbers."""
    spec = plan.spec
    demand = spec.demand
    out = [
        "; ".join([f"workload {plan.workload['name']}", *plan.workload["notes"]]),
        f"load x {demand.scale * demand.growth:g}; arrivals {demand.arrivals.kind}"
        + (f" with CV {demand.arrivals.cv:g}" if demand.arrivals.kind == "gamma" else "")
        + f"; seed {demand.seed}",
        "continuous batching with chunked prefill, first come first served; a full pool preempts "
        f"the request admitted last and recomputes it; router {spec.grid.router}",
        f"at most {spec.grid.max_batch} sequences a batch, "
        f"{spec.grid.memory_fraction:.0%} of the memory the driver reports",
    ]
    if demand.prefix_share is None:
        out.append("prefix cache ideal: every block seen before is found, on whatever replica")
    elif demand.prefix_share:
        out.append(f"prefix cache: {demand.prefix_share:.0%} of every prompt is found")
    else:
        out.append("prefix cache off")
    if any(r["level"] == "reference" and r["feasible"] for r in plan.rows):
        out.append("level reference prices the published code's operations under this scheduler")
    bases = sorted({r["basis"] for r in plan.rows if r["basis"]})
    if bases:
        text = f"basis of kernel times: {', '.join(bases)}"
        if not {"measured", "calibrated", "anchored"} & set(bases):
            text += "; these GPUs were not measured here: run `lccost calibrate`"
        out.append(text)
    dates = sorted({r["price_date"] for r in plan.rows if r["price_date"]})
    if dates:
        file = spec.money.file
        name = f"prices of {file}" if file else "bundled prices"
        text = f"{name}, dated {', '.join(dates)}; the middle of each range"
        if file is not None:
            own = {load_hardware(name).name for name in spec.grid.gpus}
            missing = sorted(own - set(known_prices(file)))
            if missing:
                text += f"; it has none of {', '.join(missing)}: the bundled price"
        out.append(text)
    if spec.money.power_usd_per_kwh is not None:
        out.append(
            f"power at {spec.money.power_usd_per_kwh:g} USD/kWh, PUE {spec.money.pue:g}, on top of "
            "rent"
        )
    if any(r.get("accuracy_analogy") for r in plan.rows):
        out.append("accuracy by analogy is from another model of the same attention and size class")
    return out


def not_built_in(row: Row) -> list[str]:
    """Methods of a plan that its engine does not have today."""
    stacks = [parse_method(str(p["method"])) for p in row["pools"]]
    engine = str(row["engine"])
    own = engine in ("lccost", "torch", "transformers")
    return list(
        dict.fromkeys(
            m.NAME
            for stack in stacks
            for m in stack.methods
            if m.STAGES and engine not in m.ENGINE_FLAGS and not own
        )
    )


def realised_sentence(row: Row) -> str | None:
    """Where rank 1 is a promise: its engine lacks the method, others have it."""
    names = not_built_in(row)
    if not names:
        return None
    where = []
    for name in names:
        found = ", ".join(parse_method(name).methods[0].REALISED_BY) or "nowhere yet"
        where.append(f"{name}: {found}")
    return (
        f"Rank 1 prices {', '.join(names)} in {row['engine']}, which does not have it; it runs in "
        f"{'; '.join(where)}."
    )


def deploy(row: Row, spec: PlanSpec, workload: Mapping[str, Any] | None = None) -> list[str]:
    """Commands that start one replica of a plan (where its engine has the method and there is one
    pool), and that put the planned load on the service: where no tool draws the lengths of
    ``workload``, at their means.
    """
    engine = str(row["engine"])
    model, pool = _hub_id(str(row["model"])), row["pools"][0]
    load_test = _load_test(model, spec, workload or {})
    if engine not in ("vllm", "sglang") or len(row["pools"]) > 1 or not_built_in(row):
        return load_test
    stack = parse_method(str(row["method_spec"]))
    flags = [flag for m in stack.methods for flag in m.ENGINE_FLAGS.get(engine, ())]
    chunk, fraction = spec.grid.chunk_tokens or 8192, f"{spec.grid.memory_fraction:g}"
    # A pipeline and a ring have that many micro-batches in flight.
    # An engine that reserves for the model's longest context may refuse to start.
    longest = [workload[f"{x}_tokens_max"] for x in ("input", "output")] if workload else []
    sequences = str(spec.grid.max_batch * pool["pp"] * pool["cp"])
    if engine == "sglang":
        if pool["ep"] > 1 or pool["cp"] > 1:
            return load_test
        serve = [
            "python", "-m", "sglang.launch_server", "--model-path", model,
            "--tp-size", str(row["tp"]), "--chunked-prefill-size", str(chunk),
            "--max-running-requests", sequences, "--mem-fraction-static", fraction,
            "--port", "8000",
        ]  # fmt: skip
        if pool["pp"] > 1:
            serve += ["--pp-size", str(pool["pp"])]
        if longest:
            serve += ["--context-length", f"{sum(longest):.0f}"]
        if spec.demand.prefix_share == 0.0:
            serve.append("--disable-radix-cache")
    else:
        serve = [
            "vllm", "serve", model, "--tensor-parallel-size", str(row["tp"]),
            "--max-num-batched-tokens", str(chunk), "--max-num-seqs", sequences,
            "--gpu-memory-utilization", fraction,
        ]  # fmt: skip
        if longest:
            serve += ["--max-model-len", f"{sum(longest):.0f}"]
        if pool["pp"] > 1:
            serve += ["--pipeline-parallel-size", str(pool["pp"])]
        if pool["cp"] > 1:
            serve += ["--prefill-context-parallel-size", str(pool["cp"])]
        if pool["ep"] > 1:
            serve += ["--data-parallel-size", str(pool["ep"]), "--enable-expert-parallel"]
        if spec.demand.prefix_share == 0.0:
            serve.append("--no-enable-prefix-caching")
    return [shlex.join([*serve, *flags]), *load_test]


def _load_test(model: str, spec: PlanSpec, workload: Mapping[str, Any]) -> list[str]:
    """The trace itself, or the plan's own requests written as one; without a plan file requests of
    mean length, which have no tail.
    """
    demand = spec.demand
    as_recorded = demand.arrivals.kind == "trace" and demand.scale * demand.growth == 1.0
    if demand.trace is not None and demand.trace.suffix == ".jsonl" and as_recorded:
        return [_replay(model, str(demand.trace), spec)]
    if spec.own_workload:
        drawn = "requests.jsonl"
        draw = ["lccost", "trace", "convert", spec.where, "--output", drawn]
        return [shlex.join(draw), _replay(model, drawn, spec)]
    args = ["vllm", "bench", "serve", "--model", model, "--dataset-name", "random"]
    for side, lengths in (("input", demand.input_tokens), ("output", demand.output_tokens)):
        fixed = lengths is not None and lengths.kind == "fixed"
        mean = (
            lengths.tokens[0]
            if lengths is not None and fixed
            else workload.get(f"{side}_tokens_mean")
        )
        if mean is not None:
            args += [f"--random-{side}-len", f"{max(1.0, mean):.0f}"]
    rate = workload.get("rate_per_s")
    if demand.rate_per_s is not None:
        rate = demand.rate_per_s * demand.scale * demand.growth
    if demand.sessions is not None:
        args += ["--max-concurrency", str(demand.sessions)]
    elif rate is not None:
        args += ["--request-rate", f"{rate:g}"]
        if demand.arrivals.kind == "gamma":
            args += ["--burstiness", f"{1 / demand.arrivals.cv**2:g}"]
    percentiles = sorted({50.0, 99.0, *(x.percentile for x in spec.slo.limits)})
    args += [
        "--num-prompts", "1000", "--ignore-eos", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", ",".join(f"{p:g}" for p in percentiles),
    ]  # fmt: skip
    return [shlex.join(args)]


def _replay(model: str, file: str, spec: PlanSpec) -> str:
    args = [
        "aiperf", "profile", "--model", model, "--endpoint-type", "completions", "--streaming",
        "--url", "http://localhost:8000", "--input-file", file,
        "--custom-dataset-type", "mooncake_trace", "--extra-inputs", "ignore_eos:true",
    ]  # fmt: skip
    sessions = spec.demand.sessions
    args += ["--fixed-schedule"] if sessions is None else ["--concurrency", str(sessions)]
    return shlex.join(args)


def _hub_id(model: str) -> str:
    from costmodel.registry import load_architecture

    try:
        return load_architecture(model).hub_id or model
    except LccostError:
        return model
