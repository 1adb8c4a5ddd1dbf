"""PyramidKV run for real: SnapKV's choice with budgets that shrink from layer to layer."""

from typing import ClassVar, final

from costmodel.methods.base import AbstractMethod
from costmodel.methods.pyramidkv import PyramidKV
from measure.methods.snapkv import WindowScoresCache


@final
class PyramidKVCache(WindowScoresCache):
    """The budget is that of the layer's place among the model's caches (``place``)."""

    NAME: ClassVar[str] = "pyramidkv"
    kernel = 5

    def _configure(self, method: AbstractMethod) -> None:
        assert isinstance(method, PyramidKV)
        self.method, self.keep, self.window = method, method.keep_tokens, method.window_tokens

    def _budget(self, n_prompt: int) -> int:
        return int(self.method.budget(float(n_prompt), float(self.layer), self.n_kv_layers))
