"""Which models come with lccost, under which names, and how a name, a file or a folder becomes one.

The bundled configs are ``costmodel/architectures/*.json``; ``index.json`` beside them maps every
spelling (hub id, its last part, alias; lower case) to a file, so one name costs two small reads.
"""

import functools
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from costmodel.architecture import Architecture
from costmodel.errors import (
    ConfigError,
    MissingExtraError,
    UnknownNameError,
    UnsupportedArchitectureError,
)
from costmodel.families import MODULES, TEXT_SECTIONS, WRAPPED, Model, known_families
from costmodel.families.numerics import unknown_numerics
from costmodel.hf_config import ConfigReader, parse_config, read_config, short

_FOLDER = Path(__file__).with_name("architectures")
#: How long the hub may take to answer whether it has a config.
HUB_TIMEOUT_S = 4.0
#: Spellings of 16- and 32-bit types in ``torch_dtype`` and ``dtype``.
_DTYPES = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float": "fp32",
}


@functools.cache
def _index() -> Mapping[str, Any]:
    text = (_FOLDER / "index.json").read_text("utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def model_names() -> list[str]:
    """Aliases of all bundled models."""
    return sorted(_index()["models"])


def load_architecture(name: str | os.PathLike[str], assume: str | None = None) -> Architecture:
    """The architecture of a bundled name or alias, a ``config.json``, a folder holding one, or a
    hub id.

    Names are case-insensitive: ``meta-llama/Llama-3.1-8B``, ``Llama-3.1-8B`` and ``llama-3.1-8b``
    are the same. ``assume`` reads the config as that ``model_type`` whatever it says, and the
    result has ``assumed`` set. Raises ``UnknownNameError``, ``ConfigError`` or
    ``UnsupportedArchitectureError``.
    """
    if assume is not None and assume not in MODULES:
        raise UnknownNameError("family", assume[:200], MODULES)
    text = os.fspath(name)
    found = bundled_architecture(text, assume)
    if found is not None:
        return found
    path = _as_path(text)
    if path is not None:
        return _from_file(path, assume)
    return _from_hub(text, assume)


def bundled_architecture(name: str, assume: str | None = None) -> Architecture | None:
    """The bundled architecture of a name; None for any other: no file and no hub is asked."""
    stem = _index()["names"].get(name.strip().lower())
    return None if stem is None else _bundled(stem, assume)


def architecture_from_config(
    config: Mapping[str, object], name: str = "config", assume: str | None = None
) -> Architecture:
    """The architecture of a config that is already in memory."""
    return _build(dict(config), where=name, name=name, hub_id=name, assume=assume)


def load_config(name: str | os.PathLike[str]) -> dict[str, Any]:
    """The ``config.json`` behind a bundled name, a file or a folder, as plain values; of a
    multimodal model the whole file. Bundled ones lack this package's own notes.
    """
    text = os.fspath(name)
    stem = _index()["names"].get(text.strip().lower())
    if stem is not None:
        file = _FOLDER / f"{stem}.json"
        config = parse_config(file.read_text("utf-8"), file.name)
        return {k: v for k, v in config.items() if k != "_lccost"}
    path = _as_path(text)
    if path is None:
        raise UnknownNameError("model", text[:200], _index()["names"], "lccost models list")
    return dict(read_config(path))


@functools.lru_cache(maxsize=256)
def _bundled(stem: str, assume: str | None) -> Architecture:
    file = _FOLDER / f"{stem}.json"
    config = parse_config(file.read_text("utf-8"), f"{stem}.json")
    own = config["_lccost"]
    if not isinstance(own, dict):
        raise ConfigError(f"{stem}.json: _lccost must be an object")
    return _build(
        config,
        where=f"{stem}.json",
        name=stem,
        hub_id=str(own["hub_id"]),
        assume=assume,
        source=str(own["source"]),
        confidence=str(own["confidence"]),
        notes=tuple(own.get("notes", ())),
    )


def _as_path(text: str) -> Path | None:
    """The config file a text points to, or None when it looks like a name."""
    try:
        path = Path(text).expanduser()
        if path.is_dir():
            return path / "config.json"
        if path.exists() or text.endswith(".json") or text.startswith((".", "/", "~")):
            return path
    except (OSError, ValueError, RuntimeError):
        return None
    return None


def _from_file(path: Path, assume: str | None) -> Architecture:
    parent = path.resolve().parent.name
    name = parent if path.name == "config.json" and parent else path.stem
    return _build(read_config(path), where=str(path), name=name, hub_id=str(path), assume=assume)


def _from_hub(text: str, assume: str | None) -> Architecture:
    unknown = UnknownNameError("model", text[:200], _index()["names"], "lccost models list")
    if text.count("/") != 1:
        raise unknown
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise MissingExtraError(
            f"{unknown} To fetch it from the Hugging Face Hub: pip install 'lccost[hub]', or give "
            "the path of its config.json"
        ) from None
    try:
        path = _fetched(hub, text)
    except (OSError, ValueError) as error:  # every error of the hub is one of these
        raise UnknownNameError(
            "model",
            text[:200],
            _index()["names"],
            f"It is not bundled, and the Hugging Face Hub gave no config.json: {error}. To go on "
            "without the hub: --model path/to/config.json; bundled models: lccost models list",
        ) from None
    config = read_config(path)
    return _build(config, where=f"{text}/config.json", name=text, hub_id=text, assume=assume)


def _fetched(hub: Any, repo: str) -> Path:
    """The config of a repository of the hub; what was fetched before where the hub cannot be asked.

    ``hf_hub_download`` alone tries for half a minute where there is no network: the hub is asked
    once, shortly, before it is called.
    """
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, "config.json"), timeout=HUB_TIMEOUT_S)
    except Exception as error:  # network errors are of the HTTP library that the hub's client uses
        try:
            return Path(hub.hf_hub_download(repo, "config.json", local_files_only=True))
        except (OSError, ValueError):
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise OSError(reason[0][:200].rstrip(".")) from None
    return Path(hub.hf_hub_download(repo, "config.json"))


def _build(
    config: dict[str, object],
    *,
    where: str,
    name: str,
    hub_id: str,
    assume: str | None,
    source: str = "",
    confidence: str = "",
    notes: tuple[str, ...] = (),
) -> Architecture:
    outer = ConfigReader(config, where, lenient=assume is not None)
    inner = outer.section(*TEXT_SECTIONS)
    reader = inner or outer
    declared = _model_type(reader, outer, assume)
    family = assume or declared
    model = _read_model(reader, outer if inner else None, family)
    unread = sorted({*reader.unread_structural(), *unknown_numerics(reader.values, family)})
    extra: tuple[str, ...] = ()
    if unread and assume is None:
        keys = ", ".join(f"{reader.path}{k} = {short(reader.raw(k))}" for k in unread[:5])
        raise UnsupportedArchitectureError(
            f"{where}: {family} models have no key {keys}, so what it does to layers, attention, "
            "cache or arithmetic is not known. Families lccost reads: "
            f"{', '.join(known_families())}. "
            f"To price it as a plain {family} all the same: --assume {family}"
        )
    if assume is not None:
        extra = (f"read as {assume} because --assume said so (its own model_type: {declared})",)
        if unread:
            extra += (f"keys not understood and left out: {', '.join(unread)}",)
    if inner is not None:
        extra += ("the text tower of a multimodal model; vision and audio towers are not priced",)
    return Architecture(
        name=name,
        hub_id=hub_id,
        family=family,
        d_model=model.d_model,
        vocab_size=model.vocab_size,
        layers=model.layers,
        shared_layers=model.shared_layers,
        other_parameters=model.other_parameters,
        embedding_parameters=model.embedding_parameters,
        tied_embeddings=model.tied_embeddings,
        head_bias=model.head_bias,
        active_adjustment=model.active_adjustment,
        dtype=_dtype(reader, outer),
        quantization=_quantization(reader, outer),
        max_context_tokens=model.max_context_tokens,
        source=source,
        confidence=confidence,
        notes=(*notes, *model.notes, *extra),
        assumed=assume is not None,
    )


def _quantization(
    reader: ConfigReader, outer: ConfigReader
) -> tuple[tuple[str, object], ...] | None:
    """The ``quantization_config``, with the ``expert_dtype`` that DeepSeek-V4 keeps beside it."""
    section = outer.section("quantization_config") or reader.section("quantization_config")
    if section is None:
        return None
    experts = reader.text("expert_dtype", default="")
    return (*section.items(), ("expert_dtype", experts)) if experts else section.items()


def _model_type(reader: ConfigReader, outer: ConfigReader, assume: str | None) -> str:
    """The family the config names; a wrapper whose text config names none stands for itself."""
    declared = reader.text("model_type", default="")
    if not declared:
        declared = outer.text("model_type", default="")
        declared = WRAPPED.get(declared, declared)
        if not declared and outer.has("ssm_cfg"):
            declared = "mamba_ssm"
    if assume is not None or declared in MODULES:
        return declared or "none"
    families = ", ".join(known_families())
    got = f"model_type {short(declared)}" if declared else "no model_type"
    raise UnsupportedArchitectureError(
        f"{reader.where}: {reader.path}model_type: {got} is not one lccost reads. "
        f"Known families: {families}. "
        "To treat it as a dense transformer: --assume llama"
    )


def _read_model(reader: ConfigReader, wrapper: ConfigReader | None, family: str) -> Model:
    module = importlib.import_module(f"costmodel.families.{MODULES[family]}")
    model = module.build(reader, family, wrapper)
    assert isinstance(model, Model)
    return model


def _dtype(reader: ConfigReader, outer: ConfigReader) -> str:
    """Dtype of the tensors that are not quantised; bf16 where the file does not say."""
    for c in (reader, outer):
        value = c.text("torch_dtype", "dtype", default="")
        if value:
            return _DTYPES.get(value.removeprefix("torch."), "bf16")
    return "bf16"
