"""Compile kernels for GPUs that are not there, and read what resources they use.

    COMPILE_CASES of a kernel's file -> triton.compile for sm_80, sm_90, sm_100
        -> shared memory from the metadata; registers and spills from ``cuobjdump -res-usage``;
           what the hot loop executes from ``nvdisasm``

The tools are in the Triton wheel; no device and no CUDA toolkit is needed.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: Compute capabilities compiled for: Ampere, Hopper, Blackwell (data centre).
ARCHITECTURES = (80, 90, 100)
#: For cases beside a kernel's main one.
HOPPER = (90,)
#: Most shared memory of one block, bytes (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT_BYTES: Mapping[int, int] = {80: 166_912, 90: 232_448, 100: 232_448}
#: Registers of one SM, and most of one thread.
REGISTERS, THREAD_REGISTERS = 65_536, 255


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """One specialisation of a kernel, as a launch makes it.

    signature   type of every run-time argument: "*bf16", "*i32", "i32", "fp32", ...
    constants   value of every ``tl.constexpr`` argument
    aligned     integer arguments known to be multiples of 16; pointers always are
    first_loop          whether the hot loop is the first in the code; else the longest
    max_loop_spills     accesses to the stack in one pass of the hot loop, where they were looked at
    architectures       compute capabilities it is compiled for
    tested              whether in every test run, or for docs/kernels.md only (slow to compile)
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    first_loop: bool = False
    max_loop_spills: int = 0
    architectures: tuple[int, ...] = ARCHITECTURES
    tested: bool = True


def typed(names: Mapping[str, str]) -> dict[str, str]:
    """{"*bf16": "q keys", "i32": "n"} -> {"q": "*bf16", "keys": "*bf16", "n": "i32"}."""
    return {name: kind for kind, listed in names.items() for name in listed.split()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one block of a compiled kernel uses.

    ``loop_instructions`` are those of one pass of the hot loop, as a warp executes them;
    ``loop_spills`` those of them that access the stack.
    """

    threads: int
    shared_bytes: int
    registers: int
    spilled_bytes: int
    loop_instructions: int
    loop_spills: int

    @property
    def resident_blocks(self) -> int:
        """Blocks that the registers of one SM hold (shared memory may allow fewer)."""
        per_block = -(-self.registers // 8) * 8 * self.threads
        return REGISTERS // per_block


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A compiled case: its resources and its texts (``ttgir``, ``ptx``; ``cubin`` in bytes)."""

    resources: Resources
    asm: Mapping[str, Any] = field(repr=False)


def compile_case(case: CompileCase, architecture: int) -> Compiled:
    """Compile for a compute capability; raises what Triton raises."""
    names = case.kernel.arg_names
    missing = set(names) ^ (set(case.signature) | set(case.constants))
    if missing:
        raise ValueError(f"{case.name}: expected every argument once, wrong: {sorted(missing)}")
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if signature[n].startswith("*") or n in case.aligned
    }
    source = ASTSource(case.kernel, signature, dict(case.constants), attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": True,
        },
    )
    threads = compiled.metadata.num_warps * 32
    registers, spilled = _usage(compiled.asm["cubin"])
    loops = _loops(compiled.asm["cubin"]) or [(0, 0)]
    instructions, spills = loops[0] if case.first_loop else max(loops)
    return Compiled(
        resources=Resources(
            threads=threads,
            shared_bytes=compiled.metadata.shared,
            registers=registers,
            spilled_bytes=spilled,
            loop_instructions=instructions,
            loop_spills=spills,
        ),
        asm=compiled.asm,
    )


def compile_cases(kernel: str) -> tuple[CompileCase, ...]:
    """Cases of a kernel's file."""
    cases: tuple[CompileCase, ...] = importlib.import_module(
        f"measure.kernels.{kernel}"
    ).COMPILE_CASES
    return cases


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack (spills)."""
    said = _ask(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if found is None:
        raise ValueError(f"cuobjdump -res-usage: expected REG and STACK, got {said[:300]!r}")
    return int(found[1]), int(found[2])


def _loops(cubin: bytes) -> list[tuple[int, int]]:
    """(instructions from a label to a branch back to it, those that access the stack) of each loop.

    What a loop jumps over is counted too; kernels have little of it.
    """
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loops = {}
    for text in _ask(triton.knobs.nvidia.nvdisasm.path, "-c", cubin).splitlines():
        if label := re.match(r"\s*(\.L\w+):", text):
            labels[label[1]] = len(opcodes)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)(.*);", text):
            opcodes.append(found[1])
            target = re.search(r"`\((\.L\w+)\)", found[2]) if found[1] == "BRA" else None
            start = labels.get(target[1], len(opcodes)) if target else len(opcodes)
            if len(opcodes) - start > 1:  # a program ends in a branch to itself
                loops[start] = len(opcodes)
    return [
        (stop - start, sum(x in ("LDL", "STL") for x in opcodes[start:stop]))
        for start, stop in sorted(loops.items())
    ]


def _ask(tool: str, option: str, cubin: bytes) -> str:
    """What a tool says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
