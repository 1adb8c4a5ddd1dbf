"""Long-context methods, one file each, found by walking this package.

Adding a method is adding ``costmodel/methods/<name>.py`` (its cost) and
``measure/methods/<name>.py`` (its runnable twin); there is no list to edit. Text forms are read by
``costmodel.methods.parse``; methods compose as ``costmodel.methods.stack`` says.
"""

import functools
import importlib
import pkgutil

from costmodel.errors import UnknownNameError
from costmodel.methods.base import AbstractMethod


@functools.cache
def method_names() -> tuple[str, ...]:
    """Names of all methods: the module names of this package (nothing is imported)."""
    modules = {m.name for m in pkgutil.iter_modules(__path__)}
    return tuple(sorted(modules - _NOT_METHODS))


#: Modules that methods share.
_NOT_METHODS = {
    "base",
    "block_retrieval",
    "chains",
    "eager",
    "hf_quantized",
    "parse",
    "stack",
    "window_scores",
}


@functools.cache
def method_class(name: str) -> type[AbstractMethod]:
    """The class of a method; raises ``UnknownNameError``."""
    key = name.strip().lower().replace("-", "_")
    if key not in method_names():
        raise UnknownNameError("method", name, method_names(), "lccost methods list")
    module = importlib.import_module(f"{__name__}.{key}")
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, AbstractMethod)
            and getattr(value, "NAME", None) == key
        ):
            return value
    raise AssertionError(f"costmodel/methods/{key}.py defines no method named {key!r}")
