"""Single-stream and static-batch runs: first tokens, decode rates, throughputs of whole runs.

Overall figures are of first tokens and decode rates as times. Throughputs, where prefill and decode
are mixed, and first tokens under load stand in the groups.
"""

from collections.abc import Sequence

from costmodel.errors import ConfigError, NotApplicableError, UnknownNameError
from costmodel.serving import Deployment
from costmodel.validation.cases import Case, Row
from costmodel.validation.cells import number, observed_value, whole
from costmodel.validation.end_to_end import grouped_rows, predicted_blocks
from costmodel.validation.kinds import Options
from costmodel.validation.names import engine_named, method_named, model_named, precision_named
from costmodel.validation.result import Block, Predictions
from costmodel.validation.table import Record

#: A prompt this long is judged apart.
LONG_PROMPT_TOKENS = 10_000
LONG_PART = "ttft_from_10000_tokens"
#: metric column -> (metric, label, seconds per unit; None: a rate of tokens per second).
_METRICS: dict[str, tuple[str, str, float | None]] = {
    "decode_tok_s": ("step", "decode", None),
    "itl_p50_s": ("step", "decode", 1.0),
    "itl_p50_ms": ("step", "decode", 1e-3),
    "tpot_s": ("step", "decode", 1.0),
    "tpot_ms": ("step", "decode", 1e-3),
    "ttft_s": ("ttft", "ttft", 1.0),
    "ttft_ms": ("ttft", "ttft", 1e-3),
    "output_tok_s": ("run", "output_throughput", None),
    "output_tok_s_per_gpu": ("run", "output_throughput", None),
    "max_output_tok_s": ("offline", "max_throughput", None),
}
#: Config keys of the columns that describe a model which is not bundled.
_DIMENSIONS = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "Hq": "num_attention_heads",
    "Hkv": "num_key_value_heads",
    "D": "head_dim",
    "d_ff": "intermediate_size",
    "vocab": "vocab_size",
}


def predict(records: Sequence[Record], options: Options) -> Predictions:
    """Seconds of every row's metric."""
    grouped, unread = grouped_rows(records, read_rows)
    blocks, unsupported = predicted_blocks(grouped, options)
    return Predictions(
        blocks=tuple(blocks),
        unsupported=(*unread, *unsupported),
        assumptions=(
            "times to first token are predicted unloaded; rates are compared as times per token",
        ),
    )


def read_rows(record: Record, index: int) -> tuple[Case, list[Row]]:
    """The case and the one metric of a row."""
    name = record.get("metric", "")
    if name not in _METRICS:
        raise NotApplicableError(_why_not(name))
    kind, label, _ = _METRICS[name]
    closed_loop = engine_is_closed_loop(record)
    batch = number(record, "batch", 1.0)
    if kind == "ttft" and not record.get("isl"):
        raise ConfigError("isl: expected the prompt's tokens, got an empty cell")
    prompt = number(record, "isl")
    output = max(float(whole(record, "osl", 0)), 1.0) if kind == "ttft" else _output(record)
    primary = label in ("decode", "ttft")
    if closed_loop and kind == "step":
        kind = "tpot"
    if closed_loop and kind == "run":
        kind = "request"
    if closed_loop and kind == "ttft":
        primary = batch == 1.0
        label = "ttft" if primary else "ttft_unloaded"
        batch = 1.0
    note = record.get("note", "").lower()
    if kind == "ttft" and "warm-up" in note and prompt < LONG_PROMPT_TOKENS:
        label, primary = "ttft_warm_up", False
    if "issue" in record.get("source", "").lower():
        # What a user reported to an engine's authors is a bug as often as a speed.
        label, primary = f"{label}_reported", False
    parts = (LONG_PART,) if label == "ttft" and prompt >= LONG_PROMPT_TOKENS else ()
    return case_of(record), [
        Row(
            index=index,
            metric=kind,
            label=label,
            concurrency=batch,
            input_tokens=prompt,
            output_tokens=output,
            primary=primary,
            parts=parts,
        )
    ]


def _output(record: Record) -> float:
    return number(record, "osl", 1.0)


def _why_not(name: str) -> str:
    if name.startswith("mlperf"):
        return f"{name}: the lengths of its prompts and answers are not in the row"
    if name.startswith(("prefill_", "decode_")):
        return "times of single layers of a model: validate them as tables of kernels"
    return f"metric {name[:60]!r} has no model here; known: {', '.join(sorted(_METRICS))}"


def engine_is_closed_loop(record: Record) -> bool:
    """Whether ``batch`` is a constant number of clients rather than a static batch."""
    return record.get("engine", "").lower().startswith("nim")


def case_of(record: Record) -> Case:
    """What the row shares with others."""
    shown = record.get("engine", "").strip().lower()
    tp = whole(record, "tp", 1) or 1
    given = record.get("weight_prec", "").lower()
    cache = record.get("kv_prec", "").lower()
    method = method_named(_method_of(shown), 1.0)
    model = record.get("model", "")
    return Case(
        model=model,
        system=record.get("hw", ""),
        engine=engine_named(shown),
        shown=shown,
        precision=precision_named(given, "weight_prec"),
        deployment=Deployment(tp=tp, moe_tp=tp),
        method=method,
        dtype="fp16" if given == "fp16" else "bf16",
        fp8_cache=None if cache in ("", "unknown") else cache.startswith("fp8"),
        shape=() if _is_bundled(model) else _dimensions(record),
    )


def _method_of(engine: str) -> str:
    """Some "engines" of prefill rows are methods inside one."""
    return (
        engine if any(m in engine for m in ("minference", "a-shape", "infllm", "mix")) else "full"
    )


def _is_bundled(model: str) -> bool:
    try:
        model_named(model)
    except UnknownNameError:
        return False
    return True


def _dimensions(record: Record) -> tuple[tuple[str, int], ...]:
    """A Llama-like model from the row's own dimensions; ``ConfigError`` where they are missing."""
    try:
        return tuple((key, whole(record, c)) for c, key in _DIMENSIONS.items())
    except ConfigError:
        raise ConfigError(
            f"model {record.get('model', '')[:60]!r} is not bundled, and the row does not give its "
            f"dimensions ({', '.join(_DIMENSIONS)})"
        ) from None


def observed(record: Record, block: Block) -> float:
    """A time in seconds; a rate of tokens as seconds per token."""
    value = observed_value(record, "value")
    name = record.get("metric", "")
    scale = _METRICS[name][2]
    if scale is not None:
        return value * scale
    if name == "max_output_tok_s":
        return 1.0 / value
    if name.endswith("_per_gpu"):
        value *= whole(record, "n_gpu", 1) or 1
    return number(record, "batch", 1.0) / value
