"""The text form of methods: ``kivi:bits=2,group=32,h2o`` and ``llmlingua2:rate=0.5+kivi:bits=4``.

A comma separates methods and parameters alike: a piece ``k=v`` without a colon belongs to the
method before it. ``+`` composes. Parameters, their types and defaults are the dataclass fields.
"""

import re
from collections.abc import Iterable
from dataclasses import fields
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

from costmodel.errors import ConfigError, UnknownNameError
from costmodel.methods import method_class, method_names
from costmodel.methods.base import AbstractMethod
from costmodel.methods.stack import MethodStack
from costmodel.units import parse_count

# "+" composes only before a name, so that 1e+3 stays a number.
_SEPARATOR = re.compile(r"\s*(,|\+(?=\s*[A-Za-z_]))\s*")
_HINT = "lccost methods list"
_Draft = tuple[type[AbstractMethod], dict[str, object]]


def parse_methods(texts: Iterable[str]) -> list[MethodStack]:
    """All methods that repeated options name, in order.

    Raises ``UnknownNameError`` for a method or parameter that does not exist, ``ConfigError`` for a
    value that does not fit. Methods that do not compose are told by ``MethodStack.refusal``.
    """
    return [stack for text in texts for stack in _parse(text)]


def parse_method(text: str) -> MethodStack:
    """Exactly one method or composition, as ``MethodStack.spec`` prints it."""
    stacks = _parse(text)
    if len(stacks) != 1:
        raise ConfigError(f"expected one method, got {len(stacks)} in {text!r}")
    return stacks[0]


def _parse(text: str) -> list[MethodStack]:
    pieces = _SEPARATOR.split(text.strip())
    drafts: list[list[_Draft]] = []
    for separator, piece in zip(["", *pieces[1::2]], pieces[::2], strict=True):
        if not piece:
            raise ConfigError(
                f"expected a method such as kivi:bits=2 between commas, got nothing in {text!r}"
            )
        name, colon, rest = piece.partition(":")
        if not colon and "=" in piece:
            if not drafts or separator == "+":
                raise ConfigError(
                    f"expected a method name before {piece!r} in {text!r}; write name:{piece}"
                )
            _add(*drafts[-1][-1], piece)
            continue
        draft: _Draft = (method_class(name), {})
        if colon:
            _add(*draft, rest)
        if separator == "+":
            drafts[-1].append(draft)
        else:
            drafts.append([draft])
    return [MethodStack(tuple(_build(*draft) for draft in stack)) for stack in drafts]


def _build(cls: type[AbstractMethod], values: dict[str, object]) -> AbstractMethod:
    clash = [k for k in cls.PRESET_SETS if k in values]
    if values.get("preset") is not None and clash:
        raise ConfigError(
            f"{cls.NAME}: preset={values['preset']} sets {', '.join(cls.PRESET_SETS)}; "
            f"leave out either the preset or {', '.join(clash)}"
        )
    return cls(**values)


def _add(cls: type[AbstractMethod], values: dict[str, object], text: str) -> None:
    """Read ``k=v`` into ``values``."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key or not value:
        raise ConfigError(f"{cls.NAME}: expected parameter=value, got {text!r}")
    key = key.replace("-", "_").lower()
    known = [f.name for f in fields(cls)]
    if key == "preset" and key not in known:
        names = [n for n in method_names() if method_class(n).PRESET_SETS]
        raise ConfigError(f"{cls.NAME} has no preset; methods with presets: {', '.join(names)}")
    if key not in known:
        if not known:
            raise ConfigError(f"{cls.NAME} has no parameters, got {text!r}")
        raise UnknownNameError(
            f"parameter of {cls.NAME}", key, known, f"lccost methods show {cls.NAME}"
        )
    if key in values:
        raise ConfigError(f"{cls.NAME}: {key} is given twice")
    values[key] = _value(f"{cls.NAME}: {key}", get_type_hints(cls)[key], value)


def _value(name: str, kind: object, text: str) -> object:
    """One value as the field's type wants it."""
    if get_origin(kind) in (Union, UnionType):  # optional: the text form never says None
        kind = next(k for k in get_args(kind) if k is not type(None))
    if get_origin(kind) is Literal:
        choices = [str(c) for c in get_args(kind)]
        if text.lower() in choices:
            return text.lower()
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {text!r}")
    if kind is bool:
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
        raise ConfigError(f"{name}: expected true or false, got {text!r}")
    if kind is int:
        return _whole(name, text)
    if kind is float:
        try:
            number = float(text)
        except ValueError:
            raise ConfigError(f"{name}: expected a number, got {text!r}") from None
        if number - number != 0:  # NaN and the infinities
            raise ConfigError(f"{name}: expected a finite number, got {text!r}")
        return number
    return text


def _whole(name: str, text: str) -> int:
    if text == "0":
        return 0
    try:
        return parse_count(text)
    except ValueError:
        raise ConfigError(
            f"{name}: expected a whole number such as 128 or 4k, got {text!r}"
        ) from None
