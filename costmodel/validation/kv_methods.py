"""Cache methods in real engines: throughputs as times, and memory.

Eager libraries run a method's published chain (level ``reference``). An engine with kernels of
its own drops tokens for good and attends a packed cache in one kernel (level ``ideal``), priced
with what was fitted to such runs. Parts and groups are also of ``reference``, what the
implementation that ran does with no factor of the method's own: the authors' chain of operations
where their code ran, else the engine's own form, in which a packed token takes as long as a 16-bit
one. Why that, and what the published runs are of, is said with their figures (docs/accuracy.md).
Overall figures are of throughputs and latencies as times; memory stands in the groups.
"""

from collections.abc import Sequence
from dataclasses import replace

from costmodel.errors import NotApplicableError
from costmodel.serving.engine_times import facts_of
from costmodel.validation.cases import Case, Grouped, Row
from costmodel.validation.cells import number, observed_value
from costmodel.validation.end_to_end import grouped_rows, predicted_blocks
from costmodel.validation.kinds import Options
from costmodel.validation.memory_blocks import (
    MemoryCase,
    MemoryRow,
    bare_method,
    memory_blocks,
)
from costmodel.validation.names import engine_named, method_named
from costmodel.validation.result import Block, Predictions
from costmodel.validation.table import Record
from costmodel.workload import Level

#: Seconds of 100 tokens after a prompt, whose timer does not wait for the prompt's last kernels:
#: part of the prompt may count too, so these rows stand in their group only.
_GENERATION = "generation_time_s_100tok"
#: metric column -> stage it must be of; any where empty.
_RATES = {
    "throughput_tok_s": "",
    "decode_tok_s": "decode",
    "prefill_tok_s": "prefill",
}
_LATENCIES = {"decode_latency_s": "decode", "prefill_latency_s": "prefill", _GENERATION: "decode"}
#: metric column -> (quantity, bytes per unit).
_MEMORY = {
    "peak_gpu_mem_gb": ("peak_torch", 1e9),
    "peak_mem_gib": ("peak_torch", 2.0**30),
    "cache_size_gib": ("state", 2.0**30),
}


#: Prompts this short are start-up in the MInference benchmark, as its notes say.
WARM_UP_TOKENS = 10_000


def predict(records: Sequence[Record], options: Options) -> Predictions:
    """Seconds, or bytes, of every row's metric."""
    memory = [i for i, r in enumerate(records) if r.get("metric", "").lower() in _MEMORY]
    is_memory = set(memory)
    timed = [i for i in range(len(records)) if i not in is_memory]
    grouped, unread = grouped_rows(
        [records[i] for i in timed], lambda record, index: read_rows(record, timed[index])
    )
    unread = [(timed[i], reason) for i, reason in unread]
    grouped |= _at_reference(grouped)
    blocks, unsupported = predicted_blocks(grouped, options)
    unsupported = list(dict.fromkeys(unsupported))
    held, refused = memory_blocks([(i, records[i]) for i in memory], _memory_case, options)
    return Predictions(
        blocks=(*blocks, *held),
        unsupported=(*unread, *unsupported, *refused),
        assumptions=(
            "throughputs are compared as times; each group names its level",
            "reference is the implementation that ran, no factor fitted to it: the authors' chain "
            "of operations where their code ran; in engines with forms of their own packed tokens "
            "at the time of 16-bit ones, and other methods have no second form",
        ),
    )


def _at_reference(grouped: Grouped) -> Grouped:
    """Runs of methods in engines with kernels for them, without a factor fitted to them too.

    The operations that a method's authors published are not judged on runs of another form: an
    engine's own is the form of level ``ideal``, but for the time it takes to attend packed tokens.
    """
    out: Grouped = {}
    for case, rows in grouped.items():
        if case.method == "full" or case.level != "ideal":
            continue
        chosen, second = rows, replace(case, level="reference")
        if facts_of(case.engine).own_forms:
            second = replace(case, own_form=True)
            is_packed = "bits=" in case.method
            chosen = [row for row in rows if is_packed and row.metric == "step"]
        if chosen:
            out[second] = [
                replace(r, primary=False, parts=tuple(f"{p}_at_reference" for p in r.parts))
                for r in chosen
            ]
    return out


def read_rows(record: Record, index: int) -> tuple[Case, list[Row]]:
    """The case and the one metric of a row."""
    name = record.get("metric", "").lower()
    stage = _stage(name, record.get("stage", "").lower())
    batch, prompt = number(record, "batch"), number(record, "prompt_len")
    output = number(record, "gen_len", 1.0) if stage == "decode" else 1.0
    method = method_named(_method_text(record), prompt)
    engine = engine_named(_engine_text(record))
    case = Case(
        model=record.get("model", ""),
        system=_hardware_text(record),
        engine=engine,
        shown=engine,
        method=method,
        level=_level(engine),
        dtype=_dtype(record),
        fp8_cache=False,
    )
    label = stage
    if name == _GENERATION:
        label = "generation"
    elif stage == "prefill" and _is_warm_up(record, prompt):
        label = "prefill_warm_up"
    row = Row(
        index=index,
        metric="ttft" if stage == "prefill" else "step",
        label=label,
        primary=label == stage,
        concurrency=batch,
        input_tokens=prompt,
        output_tokens=output,
        parts=(f"{stage}_{bare_method(method)}",) if label == stage else (),
    )
    return case, [row]


#: The repository (of that paper's authors) whose table says so.
_WARM_UP_SOURCE = "minference"


def _is_warm_up(record: Record, prompt_tokens: float) -> bool:
    """Short prompts of the source that says its first rows are dominated by start-up."""
    is_named = _WARM_UP_SOURCE in record.get("source", "").lower()
    return prompt_tokens <= WARM_UP_TOKENS and is_named


def _level(engine: str) -> Level:
    """``ideal`` where the engine brings kernels for the methods it runs."""
    return "reference" if engine == "transformers" else "ideal"


def _stage(name: str, given: str) -> str:
    if name in _LATENCIES:
        return _LATENCIES[name]
    if name not in _RATES:
        known = ", ".join((*_RATES, *_LATENCIES, *_MEMORY))
        raise NotApplicableError(f"metric {name[:60]!r} has no model here; known: {known}")
    stage = _RATES[name] or {"decoding": "decode", "decode": "decode", "prefill": "prefill"}.get(
        given, ""
    )
    if not stage:
        raise NotApplicableError(
            f"{name} of stage {given[:20]!r}: weights offloaded to the host; the schedule is not "
            "in the row"
        )
    return stage


def _hardware_text(record: Record) -> str:
    """A GPU column may carry remarks in brackets."""
    return record.get("hardware", "").partition("(")[0].strip()


def _engine_text(record: Record) -> str:
    """Where a row says which engine ran: its method, its hardware remark, its note, its source."""
    parts = ("method", "hardware", "note", "source")
    texts = [record.get(c, "").lower() for c in parts]
    if "lmdeploy" in texts[1]:
        return "lmdeploy pytorch"
    names = ("minference", "a-shape", "infllm", "vllm", "sglang", "flashattention")
    for name in names:
        if name in texts[0]:
            return name.replace("flashattention", "hf")
    for text in (texts[2], texts[3]):
        for name in ("vllm", "sglang", "flexgen", "flexllmgen", "kvpress"):
            if name in text:
                return name
    return "transformers"  # methods are published as changes of it


def _method_text(record: Record) -> str:
    return record.get("method", "")


def _memory_case(record: Record) -> tuple[MemoryCase, MemoryRow]:
    prompt = number(record, "prompt_len")
    method = method_named(_method_text(record), prompt)
    case = MemoryCase(
        model=record.get("model", ""),
        system=_hardware_text(record),
        engine=engine_named(_engine_text(record)),
        method=method,
        level=_level(engine_named(_engine_text(record))),
        quantity=_MEMORY[record.get("metric", "").lower()][0],
        dtype=_dtype(record),
        primary=False,
    )
    row = MemoryRow(
        batch=number(record, "batch"),
        context_tokens=prompt,
        output_tokens=number(record, "gen_len", 1.0),
    )
    return case, row


def _dtype(record: Record) -> str:
    return "fp16" if "fp16" in record.get("note", "") + record.get("method", "") else "bf16"


def observed(record: Record, block: Block) -> float:
    """A latency or a rate as seconds per step or prompt batch; memory in bytes."""
    value = observed_value(record, "value")
    name = record.get("metric", "").lower()
    if name in _MEMORY:
        return value * _MEMORY[name][1]
    batch = number(record, "batch")
    if block.group["metric"].startswith("prefill"):
        return value if name in _LATENCIES else batch * number(record, "prompt_len") / value
    if name in _LATENCIES:
        return value / max(number(record, "gen_len", 1.0) - 1.0, 1.0)
    return batch / value
