"""Where the kernels run: in the interpreter on the CPU, or on the CUDA device."""

from importlib import import_module

import pytest
import torch

from measure.kernels import interpreted, kernel_names

#: Integers as ``COMPILE_CASES`` writes them; floats are of any type.
INTEGERS = {torch.int8: "*i8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if interpreted() else "cuda")


@pytest.fixture(scope="session", autouse=True)
def launches_are_as_compiled():
    """What is launched here has a case that is compiled, with the same types of integers: the
    interpreter lets pass what the compiler refuses.
    """
    if not interpreted():
        yield
        return
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run
    files = [import_module(f"measure.kernels.{name}") for name in kernel_names()]
    cases = [case for file in files for case in file.COMPILE_CASES]

    def launch(kernel, *args, **options):
        named = dict(zip(kernel.arg_names, args, strict=False)) | options
        given = {n: INTEGERS[x.dtype] for n, x in named.items() if _is_integer(x)}
        declared = [c.signature for c in cases if c.kernel is kernel]
        compiled = [{n: k for n, k in s.items() if k in INTEGERS.values()} for s in declared]
        assert given in compiled, f"{kernel.__name__}: launched with {given}, compiled: {compiled}"
        return run(kernel, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", launch)
        yield


def _is_integer(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype in INTEGERS
