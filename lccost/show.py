"""Predictions as text: one table per model, GPU, context and batch, and what each method leaves
alone.

The table is plain text, on a terminal and in a pipe alike, nothing cut off; rich draws the wide
one of ``--explain``.
"""

import io
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from costmodel.units import format_bytes, format_seconds, format_si, format_traffic
from lccost import text_table
from lccost.sweep import Sweep
from lccost.text_table import Column

if TYPE_CHECKING:
    from rich.console import Console

Row = dict[str, Any]
BOUND_WORDS = {
    "compute": "compute",
    "weight": "weights",
    "kv": "KV/state",
    "launch": "launch",
    "link": "link",
}
PIPE_WIDTH = 200
#: Narrower than this, intervals and long names take a second line.
COMPACT_BELOW = 185


def width() -> int:
    """Columns to write for: the terminal's, or many in a pipe."""
    if not sys.stdout.isatty():
        return PIPE_WIDTH
    import shutil  # a pipe does without

    return max(shutil.get_terminal_size().columns, 100)


def console(file: io.StringIO) -> "Console":
    """A console that writes text: coloured on a terminal, plain and wide in a pipe."""
    from rich.console import Console

    return Console(
        file=file,
        width=width(),
        force_terminal=sys.stdout.isatty(),
        highlight=False,
        markup=False,
        emoji=False,
    )


def predictions(
    rows: Sequence[Row],
    run: Sweep,
    assumptions: Sequence[str],
    *,
    markdown: bool = False,
    solve: str | None = None,
) -> str:
    """The report of ``lccost predict``."""
    wide = width()

    def key(row: Row) -> tuple[Any, ...]:
        return (row["model"], row["gpu"], row["context_tokens"], row["batch"])

    order = list(dict.fromkeys(key(r) for r in rows))
    groups = {k: [r for r in rows if key(r) == k] for k in order}
    out: list[str] = []
    for members in groups.values():
        out.append(_wrapped(_heading(members[0], run), wide))
        if solve:
            out.append(_wrapped(_answer(members, solve), wide))
        table = _table(members, markdown, wide).rstrip("\n")
        out.append(f"\n{table}\n" if markdown else table)
        out.append(_wrapped(_prefill_sentence(members), wide) + "\n")
    out += [_wrapped(line, wide) for line in _leaves_alone(run)]
    out.append("")
    out += [_wrapped(f"- {line}", wide) for line in assumptions]
    return "\n".join(out) + "\n"


def _wrapped(text: str, wide: int) -> str:
    """Lines broken between words, where they are too long."""
    return "\n".join(
        part if len(part) <= wide else "\n".join(textwrap.wrap(part, wide, break_long_words=False))
        for part in text.split("\n")
    )


def _heading(row: Row, run: Sweep) -> str:
    architecture = next(a for a in run.architectures if a.name == row["model"])
    hardware = next(h for h in run.hardware if h.name == row["gpu"])
    weights = row["weights_bytes"]
    gpus = f"{row['tp']} x {hardware.title}" if row["tp"] > 1 else hardware.title
    stored = f" in {format_bytes(weights)} of weights per GPU" if weights else ""
    active = architecture.n_active_parameters
    sparse = (
        f" ({format_si(float(active), '').strip()} active)"
        if active < architecture.n_parameters
        else ""
    )
    return (
        f"{architecture.name} · {format_si(float(architecture.n_parameters), '').strip()} "
        f"parameters{sparse}{stored} · {gpus} · {row['level']} · {row['dtype']} · "
        f"context {row['context_tokens']:,} · batch {row['batch']:,} · "
        f"output {row['output_tokens']:,}"
    )


def _answer(members: Sequence[Row], solve: str) -> str:
    name = solve.replace("-", " ")
    key = {"max-batch": "max_batch", "max-context": "max_context_tokens", "min-gpus": "min_gpus"}
    parts = []
    for row in members:
        if not row["applicable"]:
            continue
        value = row[key[solve]]
        if value is None:
            text = "unlimited by memory" if solve == "max-context" else "none up to 64"
        else:
            text = f"{value:,}"
        parts.append(f"{row['method_spec']} {text}")
    return f"{name}: " + "; ".join(parts)


def _interval(row: Row, name: str, separator: str) -> str:
    mid, low, high = row[f"{name}_s"], row[f"{name}_low_s"], row[f"{name}_high_s"]
    return f"{format_seconds(mid)}{separator}({format_seconds(low)} - {format_seconds(high)})"


def _count(value: int | None, unlimited: str = "no limit") -> str:
    return unlimited if value is None else f"{value:,}"


def _accuracy(row: Row) -> str:
    drop = row["accuracy_drop_points"]
    return "unknown" if drop is None else f"{drop:+.1f} points" if drop else "0"


def _table(members: Sequence[Row], markdown: bool, wide: int) -> str:
    between = "\n" if wide < COMPACT_BELOW and not markdown else " "
    columns = (
        Column(title="method", folds=True),
        *(
            Column(title=title, is_number=True)
            for title in (
                *("KV/state", "peak", "decode\nbytes", "TTFT\n(low - high)"),
                "TPOT\n(low - high)",
            )
        ),
        Column(title="decode\nbound"),
        Column(title="fits"),
        Column(title="max\nsequences", is_number=True),
        Column(title="max\ncontext", is_number=True),
        Column(title="accuracy\ngiven up"),
    )
    rows = [_cells(row, between) for row in members]
    if markdown:
        return text_table.markdown(columns, rows)
    return text_table.plain(columns, rows, wide)


def _cells(row: Row, between: str) -> tuple[str, ...]:
    if not row["applicable"]:
        return (row["method_spec"], f"not{between}applicable", *[""] * 9)
    state = format_bytes(row["state_bytes"])
    if row["state_host_bytes"]:
        state += f"{between}+ {format_bytes(row['state_host_bytes'])} host"
    same = row["equals_full"] and row["method"] != "full"
    return (
        row["method_spec"] + (" (= full here)" if same else ""),
        state,
        format_bytes(max(row["peak_prefill_bytes"], row["peak_decode_bytes"])),
        format_traffic(row["decode_hbm_bytes"]),
        _interval(row, "ttft", between),
        _interval(row, "tpot", between),
        BOUND_WORDS[row["decode_bound"]],
        "yes" if row["fits"] else "no",
        _count(row["max_batch"]),
        _count(row["max_context_tokens"]),
        _accuracy(row),
    )


def _prefill_sentence(members: Sequence[Row]) -> str:
    """What the table's methods do to prefill, in one sentence, and why rows are missing."""
    shown = [r for r in members if r["applicable"]]
    lines = [f"{r['method_spec']}: {r['reason']}" for r in members if not r["applicable"]]
    if shown:
        base = next((r for r in shown if r["method"] == "full"), shown[0])
        same = [r["method_spec"] for r in shown if r["ttft_s"] >= 0.97 * base["ttft_s"]]
        faster = [r["method_spec"] for r in shown if r["ttft_s"] < 0.97 * base["ttft_s"]]
        text = (
            f"prefill {format_si(base['prefill_flops'], 'FLOP')}, "
            f"{BOUND_WORDS[base['prefill_bound']]}-bound, roofline "
            f"{format_seconds(base['roofline_ttft_s'])}"
        )
        if faster:
            rest = [s for s in same if s != base["method_spec"]]
            text += f": shorter with {', '.join(faster)}"
            text += f"; not with {', '.join(rest)}" if rest else ""
        elif len(shown) > 1:
            text += ": no method here changes it"
        lines.append(text + ".")
        lines.append(
            f"decode roofline {format_seconds(base['roofline_tpot_s'])} per step for "
            f"{base['method_spec']}: what bounds a step is what a method must shrink to help."
        )
    beyond = [r["method_spec"] for r in shown if r["extrapolated"]]
    if beyond:
        which = "all methods" if len(beyond) == len(shown) > 1 else ", ".join(beyond)
        lines.append(f"times of {which} are extrapolated far beyond the calls that were measured.")
    return "\n".join(lines)


def _leaves_alone(run: Sweep) -> Iterable[str]:
    shown = {m.NAME: m.DOES_NOT_SAVE for s in run.stacks for m in s.methods if m.STAGES}
    for name, text in shown.items():
        yield f"{name} does not save {text}"


def explanations(run: Sweep) -> str:
    """Memory by part, and every operation with its formula and numbers, for the first context and
    batch.
    """
    from rich import box
    from rich.table import Table

    from lccost.explain import explain

    file = io.StringIO()
    out = console(file)
    for block in explain(run):
        out.print()
        out.print(
            f"{block['model']} · {block['gpu']} · {block['method_spec']} · context "
            f"{block['context_tokens']:,} · batch {block['batch']:,}: one GPU"
        )
        for line in _memory_lines(block):
            out.print(line)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title, justify in (
            ("phase", "left"),
            ("operation", "left"),
            ("runs", "right"),
            ("FLOPs each", "right"),
            ("executed", "right"),
            ("weights", "right"),
            ("state", "right"),
            ("workspace", "right"),
            ("link", "right"),
            ("time all", "right"),
            ("formula", "left"),
            ("source", "left"),
        ):
            table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for op in block["operations"]:
            table.add_row(
                op["phase"],
                op["name"],
                f"{op['count']:.4g}",
                *(
                    format_si(op[k], u) if op[k] else ""
                    for k, u in (
                        ("flops", "F"),
                        ("executed_flops", "F"),
                        ("weight_bytes", "B"),
                        ("state_bytes", "B"),
                        ("workspace_bytes", "B"),
                        ("link_bytes", "B"),
                    )
                ),
                format_seconds(op["time_s"]),
                _with_numbers(op),
                op["source"],
            )
        out.print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _memory_lines(block: Row) -> Iterable[str]:
    """State formula and peaks with the numbers put in."""
    state, memory = block["state"], block["memory"]
    symbols = ", ".join(f"{k} = {v:,}" for k, v in state["symbols"].items())
    host = f" + {state['host_bytes']:,} on the host" if state["host_bytes"] else ""
    yield f"state    {state['formula']}; all layers, {symbols}: {state['bytes']:,} bytes{host}"
    for phase in ("prefill", "decode"):
        m = memory[phase]
        peak, weights, cache, transient, engine = (
            format_bytes(m[f"{name}_bytes"])
            for name in ("peak", "weights", "state_allocated", "transient", "engine")
        )
        room = m["kernel_room_bytes"]
        kernels = f" + what kernels keep {format_bytes(room)}" if room else ""
        yield (
            f"peak     {phase} {peak} = weights {weights} + KV/state {cache} + "
            f"{m['transient_of']} {transient}{kernels} + engine {engine}"
        )
    yield (
        f"capacity {format_bytes(memory['capacity_bytes'])} of "
        f"{format_bytes(memory['reported_bytes'])} the driver reports"
    )


def _with_numbers(op: Row) -> str:
    numbers = ", ".join(
        f"{name} {value:,.0f}" if value == int(value) else f"{name} {value:.6g}"
        for name, value in op["shape"].items()
    )
    return f"{op['formula']} [{numbers}]" if numbers else str(op["formula"])
