"""The unpacking instructions, which no interpreter runs: carried out here, one by one."""

import re

import pytest
import torch

from measure.kernels import _unpack

MASK = 0xFFFFFFFF


def instructions(function, *arguments) -> list[list[str]]:
    text = function.fn(*arguments).strip("{} ")
    return [re.split(r"[ ,]+", x.strip()) for x in text.split(";") if x.strip()]


def execute(program, register: int) -> torch.Tensor:
    """The two halves that a program makes of a register of two words."""
    values = {"$1": register}

    def value(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    for operation, target, *rest in program:
        if operation == ".reg":
            continue
        a, b, c = ([value(x) for x in rest[:3]] + [0, 0, 0])[:3]
        if operation == "lop3.b32":
            assert rest[3] == "0xEA"  # the table of (a & b) | c
            values[target] = (a & b) | c
        elif operation == "shl.b32":
            values[target] = (a << b) & MASK
        elif operation == "shr.u32":
            values[target] = a >> b
        elif operation == "and.b32":
            values[target] = a & b
        else:
            assert operation == "mov.b32"
            values[target] = a
    halves = [values["$0"] & 0xFFFF, values["$0"] >> 16]
    return torch.tensor(halves, dtype=torch.int32).to(torch.uint16).view(torch.float16)


@pytest.mark.parametrize(("bits", "j"), [(b, j) for b in (2, 4) for j in range(16 // b)])
def test_every_code_among_all_other_bits(bits, j):
    program, levels = instructions(_unpack.ptx_of, bits, j), 1 << bits
    scale = _unpack.scale_of.fn(bits, j)
    for code in range(levels):
        for others in (0, 0xFFFF, 0x5A3C):
            word = others & ~((levels - 1) << (bits * j)) | code << (bits * j)
            neighbour = word ^ 0xFFFF  # holds the complement of the code
            halves = execute(program, word | neighbour << 16)
            expected = torch.tensor([1 + code / scale, 1 + (levels - 1 - code) / scale])
            assert torch.equal(halves.float(), expected)


@pytest.mark.parametrize("j", [0, 1])
def test_every_e4m3_number(j):
    program = instructions(_unpack.e4m3_ptx, j)
    for byte in range(256):
        number = torch.tensor([byte], dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()
        if number == number:  # no NaN
            word = byte << 8 * j | 0xA5 << 8 * (1 - j)
            halves = execute(program, word | word << 16)
            assert halves.tolist() == [number * 2.0**-8] * 2
