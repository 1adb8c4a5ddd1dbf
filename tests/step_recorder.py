"""A stand-in for CUDA graphs on a CPU: records what a call asks for, repeats it with nothing else.

Every operation that reaches PyTorch's dispatcher (and every launch of an interpreted Triton kernel)
is kept with its arguments: tensors by their memory, numbers as they were. A replay runs them again
in order and writes each result where the first one went, as a graph does. What a graph cannot hold,
reading the device from the host or sending it host data, is refused as CUDA refuses it.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from measure.devices.base import Captured

REFUSED = "operation not permitted when stream is capturing"


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def memory(x):
    return x.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Operations in order, as (what to call, where its results go)."""

    def __init__(self):
        super().__init__()
        self.tape, self.launches = [], 0
        self._in_kernel = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._in_kernel:
            return func(*args, **kwargs)
        from_host = func.overloadpacket is torch.ops.aten.lift_fresh
        reads = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func is torch.ops.aten.index.Tensor:  # only a mask decides how much comes out
            reads = any(x.dtype == torch.bool for x in tensors(args[1]))
        if from_host or reads:
            raise RuntimeError(f"{REFUSED}: {func}")
        given = {memory(x) for x in tensors((args, kwargs))}
        out = func(*args, **kwargs)
        own = [x if memory(x) not in given else None for x in tensors(out)]
        self.tape.append((lambda: func(*args, **kwargs), own))
        return out

    @contextlib.contextmanager
    def kernels(self):
        """Record launches of interpreted kernels too."""
        from triton.runtime.interpreter import InterpretedFunction

        run = InterpretedFunction.run

        def launch(function, *args, **kwargs):
            self._in_kernel = True
            try:
                out = run(function, *args, **kwargs)
            finally:
                self._in_kernel = False
            self.launches += 1
            self.tape.append((lambda: run(function, *args, **kwargs), []))
            return out

        InterpretedFunction.run = launch
        try:
            yield
        finally:
            InterpretedFunction.run = run

    @torch.inference_mode()
    def replay(self):
        for call, targets in self.tape:
            fresh = tensors(call())
            for target, value in zip(targets, fresh, strict=False):
                if target is not None:
                    target.copy_(value)


class RecordingDevice:
    """What ``captured_step`` needs of a device: capturing, after warm-up calls as on a GPU."""

    def __init__(self, *, kernels=False):
        self.kernels = kernels
        self.recorded = None

    def capture(self, call, before):
        before()
        call()
        before()
        self.recorded = Recording()
        launches = self.recorded.kernels() if self.kernels else contextlib.nullcontext()
        try:
            with launches, self.recorded:
                call()
        except RuntimeError as error:
            return Captured(replay=None, reason=str(error))
        before()
        return Captured(replay=self.recorded.replay, reason="")
