"""What ``scripts/gpu_run.sh`` does on a GPU, in order of importance, and how long that should take.

    python scripts/gpu_plan.py [--gpu h200-sxm] [--budget 520]    the plan; needs no GPU
    python scripts/gpu_plan.py --steps                            one step a line, for the script

A step is one process; a `measure` step keeps one worker for all points of a model, because starting
CUDA and making weights of 16 GB costs more than a point. Seconds of points come from the tool's own
predictions (prompts and steps, times how often each is run), those of starting and compiling from
the constants below: what people report of such machines, not measured here. `say` of the script
prints what a step really took beside it.
"""

import argparse
import math
from dataclasses import dataclass
from typing import Literal

from costmodel.errors import LccostError, NotApplicableError
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.methods.parse import parse_methods
from costmodel.registry import load_architecture
from costmodel.units import parse_count
from costmodel.workload import Workload
from measure.runnable import runnable_names

Kind = Literal["doctor", "calibrate", "tests", "kernels", "prompt-kernels", "measure"]

#: Seconds: a command line with its predictions; a worker that imports PyTorch and opens CUDA;
#: random weights per 1e9 bytes (drawn on the GPU); what a point does beside prompts and steps
#: (canaries, exact caches layer by layer, a graph captured and compared); one kernel compiled.
CLI_S, WORKER_S, WEIGHTS_S_PER_GB, POINT_S, COMPILE_S = 2.0, 9.0, 0.03, 1.6, 1.5
#: A prompt is run once counted and at least twice warm; ``--seconds`` of samples, three at least.
SAMPLE_S, MAX_PREFILL_S = 0.3, 1.0
_PROMPT_RUNS, _LEAST_SAMPLES, _MOST_SAMPLES = 3, 3, 7
#: Steps beside the samples, eager and replayed: counted, warm, compared; host time of an eager one
#: per layer is that of its launches.
_STEPS, _EAGER_S_PER_LAYER = 25, 2.5e-4
#: Kernels that a method's steps and prompts compile with ``--engine lccost``.
_KERNELS_PER_METHOD = 3
#: A point that the worker finds too large.
_REFUSED_S = 0.2
#: Tests that need a GPU, kernels of dropping methods compiled and compared among them.
TESTS_S, DOCTOR_S = 100.0, 9.0
KERNELS_S, PROMPT_KERNELS_S = 110.0, 40.0

LLAMA = "llama-3.1-8b"
MAIN = "full,kivi:bits=2,kivi:bits=4,fp8_kv,h2o,streaming_llm,snapkv,tova,quest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One process of the run; ``name`` is the file of its records."""

    kind: Kind
    name: str
    models: str = ""
    methods: str = ""
    contexts: str = ""
    batches: str = ""
    engine: str = "torch"
    energy_s: float = 0.0

    @property
    def arguments(self) -> str:
        """Options of ``lccost measure``."""
        return (
            f"--model {self.models} --method {self.methods} --context {self.contexts} "
            f"--batch {self.batches} --engine {self.engine} --energy {self.energy_s:g}"
        )


def steps() -> list[Step]:
    """Most wanted first: a run that is cut short has that, and the next goes on."""
    everything = ",".join(["full", *(n for n in runnable_names() if n != "full"), "kivi:bits=4"])

    def grid(name: str, methods: str, contexts: str, batches: str, **more: object) -> Step:
        options = {"models": LLAMA, **more}
        return Step(
            kind="measure",
            name=name,
            methods=methods,
            contexts=contexts,
            batches=batches,
            **options,  # type: ignore[arg-type]
        )

    return [
        Step(kind="doctor", name="doctor"),
        Step(kind="calibrate", name="profile"),
        grid("llama-3.1-8b", MAIN, "8k,32k", "1"),
        grid("kernels-in-place", MAIN, "32k,128k", "1", engine="lccost"),
        grid("recurrent", "full", "8k,32k,128k", "1,8", models="mamba2-2.7b,recurrentgemma-9b"),
        Step(kind="tests", name="tests"),
        grid("energy", "full,kivi:bits=2", "32k", "1,8", engine="lccost", energy_s=5.0),
        Step(kind="kernels", name="kernels"),
        grid("llama-3.1-8b", MAIN, "8k,32k", "8"),
        Step(kind="prompt-kernels", name="prompt_kernels"),
        grid("kernels-in-place", MAIN, "8k,32k", "8,32", engine="lccost"),
        grid("transformers", "full,kv_offload", "8k,32k", "1", engine="transformers"),
        grid("llama-3.1-8b", everything, "8k,128k", "1"),
        grid("recurrent", "full", "8k,32k,128k", "32", models="mamba2-2.7b,recurrentgemma-9b"),
        grid("kernels-in-place", everything, "8k,128k", "1,8", engine="lccost"),
        grid("energy", "full,kivi:bits=2,h2o,streaming_llm", "32k", "1,8", energy_s=5.0),
        Step(kind="kernels", name="kernels"),  # it goes on where it stopped
        grid("llama-3.1-8b", everything, "8k,16k,32k,64k,128k", "1,8,32"),
    ]


def calibration_s() -> float:
    """Entries of a quick calibration times what each samples, warms up and allocates."""
    from measure.microbenchmarks import plan as plans  # it loads PyTorch

    plan = plans.GPU_QUICK
    sizes, groups = len(plan.head_dims), len(plan.groups)
    entries = len(plan.gemm_shapes) * len(plan.rows) + len(plan.stream_bytes) + 2
    entries += sizes * (len(plan.prefill_tokens) + len(plan.windows))
    entries += sizes * groups * len(plan.decode_tokens)
    entries += 3 * len(plan.layer_rows) + len(plan.bits) * 4 * len(plan.kivi_tokens)
    entries += 8 * len(plan.method_tokens) + 6 * sizes * len(plan.kept_tokens)
    entries += sum(map(len, (plan.convolved, plan.mamba2, plan.rglru, plan.mamba, plan.delta)))
    return CLI_S + WORKER_S + entries * (2.0 * plan.seconds + 0.02)


def step_s(
    step: Step, hardware: HardwareProfile, done: set[tuple[object, ...]]
) -> tuple[int, float]:
    """(points, seconds) of a step; ``done`` are the points of the steps before, which are kept."""
    fixed = {
        "doctor": DOCTOR_S,
        "calibrate": calibration_s(),
        "tests": TESTS_S,
        "kernels": KERNELS_S,
        "prompt-kernels": PROMPT_KERNELS_S,
    }
    if step.kind != "measure":
        return 0, fixed[step.kind]
    from costmodel.predict import predict  # the script asks for steps alone, again and again

    total, n_points, compiled = CLI_S, 0, set[str]()
    for model in step.models.split(","):
        architecture = load_architecture(model)
        contexts = [parse_count(x) for x in step.contexts.split(",")]
        batches = [int(x) for x in step.batches.split(",")]
        weighed = False
        for stack in parse_methods([step.methods]):
            keys = {
                (i, j): (step.name, step.engine, model, stack.spec, context, batch, step.energy_s)
                for i, batch in enumerate(batches)
                for j, context in enumerate(contexts)
            }
            todo = {at: key for at, key in keys.items() if key not in done}
            done.update(todo.values())
            n_points += len(todo)
            grid = Workload.of([[b] for b in batches], [contexts], 16)
            try:
                found = predict(
                    architecture, stack, grid, hardware, engine=step.engine, solve=False
                )
            except NotApplicableError:
                continue
            if todo and not weighed:
                total += WORKER_S + WEIGHTS_S_PER_GB * float(found["weights_bytes"].max()) / 1e9
                weighed = True
            for at in todo:
                if not found["fits"][at]:
                    total += _REFUSED_S
                    continue
                times = float(found["ttft_s"][at]), float(found["tpot_s"][at])
                total += POINT_S + point_s(*times, architecture.n_layers) + step.energy_s
                if step.engine == "lccost" and stack.spec not in compiled:
                    compiled.add(stack.spec)
                    total += _KERNELS_PER_METHOD * COMPILE_S
    return n_points, total


def point_s(ttft_s: float, tpot_s: float, n_layers: int) -> float:
    """Prompts, then eager and replayed steps."""

    def sampled(seconds: float) -> float:
        samples = min(_MOST_SAMPLES, max(_LEAST_SAMPLES, math.ceil(SAMPLE_S / seconds)))
        return max(SAMPLE_S, samples * seconds)

    prompt = 0.0
    if ttft_s <= MAX_PREFILL_S:
        prompt = _PROMPT_RUNS * ttft_s + sampled(ttft_s)
    eager = max(tpot_s, _EAGER_S_PER_LAYER * n_layers)
    return prompt + _STEPS * (eager + tpot_s) / 2 + sampled(eager) + sampled(tpot_s)


def show(hardware: HardwareProfile, budget_s: float) -> str:
    """The plan as a table: which run of ``budget_s`` seconds a step falls into."""
    lines = [
        f"plan for {hardware.title}, predicted; runs of {budget_s:g} s",
        f"{'step':32}{'points':>7}{'seconds':>9}{'so far':>8}  run",
    ]
    total, done = 0.0, set[tuple[object, ...]]()
    for step in steps():
        n, seconds = step_s(step, hardware, done)
        first = int(total // budget_s) + 1
        total += seconds
        last = max(first, math.ceil(total / budget_s))
        label = step.name
        if step.kind == "measure":
            label += f" {step.contexts} x {step.batches}"
        runs = str(first) if first == last else f"{first}-{last}"
        lines.append(f"{label[:31]:32}{n or '':>7}{seconds:>9.0f}{total:>8.0f}  {runs}")
    lines.append(
        f"{total:.0f} s in all: {math.ceil(total / budget_s)} runs; each goes on where the last "
        "stopped"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h200-sxm", help="profile that predicts")
    parser.add_argument("--budget", type=float, default=520.0, help="seconds of one run")
    parser.add_argument("--steps", action="store_true", help="one step a line: kind, name, options")
    options = parser.parse_args()
    if options.steps:
        for step in steps():
            print(step.kind, step.name, step.arguments if step.kind == "measure" else "", sep="\t")
        return 0
    try:
        print(show(load_hardware(options.gpu), options.budget))
    except LccostError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
