"""Tensors of a local checkpoint folder: safetensors only, files are hostile until read.

Pickles are refused (opening one can run anything), and so is an index that names files outside its
folder. Experts that are stored one by one are stacked, as ``measure.checkpoints`` has them.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from costmodel.errors import ConfigError, MissingExtraError

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_INDEX_BYTES = 64 * 2**20
#: A file beside the index, and nothing else.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: prefix, number, part and rest of an expert that is stored by itself
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
#: Stored spelling -> the spelling of transformers' own modules.
_SPELLINGS = ((".block_sparse_moe.", ".mlp."),)


#: Number of the layer a tensor belongs to.
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def load_state(
    folder: str | Path, dtype: torch.dtype, device: torch.device, n_layers: int | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a folder's checkpoint in ``dtype`` on ``device``, of its first
    ``n_layers`` layers where given.

    Raises ``ConfigError`` for anything but plain floating-point safetensors.
    """
    folder = Path(folder)
    state: dict[str, Tensor] = {}
    for path, wanted in shards(folder).items():
        state |= _tensors(path, wanted, dtype, device, n_layers)
    return _short_convolutions(_stacked(state))


def shards(folder: Path) -> dict[Path, frozenset[str] | None]:
    """Files of a checkpoint with the tensors the index finds in each (None: all)."""
    index = folder / _INDEX
    if index.is_file():
        found: dict[Path, set[str]] = {}
        for tensor, name in _weight_map(index).items():
            found.setdefault(folder / name, set()).add(tensor)
        missing = sorted(p.name for p in found if not p.is_file())
        if missing:
            raise ConfigError(f"{index}: names {missing[0]}, which is not in the folder")
        return {path: frozenset(names) for path, names in sorted(found.items())}
    files = (
        [folder / _SINGLE] if (folder / _SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
    )
    if len(files) == 1:
        return {files[0]: None}
    if not folder.is_dir():
        raise ConfigError(f"weights: expected a checkpoint folder, got {folder}")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles and not files:
        raise ConfigError(
            f"{folder}: holds {pickles[0]}, a pickle, which is never opened; convert the "
            "checkpoint to safetensors"
        )
    raise ConfigError(f"{folder}: expected {_SINGLE} or {_INDEX}, got {len(files)} .safetensors")


def _weight_map(index: Path) -> Mapping[str, str]:
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise ConfigError(f"{index}: larger than {_MAX_INDEX_BYTES >> 20} MiB")
    try:
        document: Any = json.loads(index.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{index}: not JSON: {str(error)[:200]}") from None
    found = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found:
        raise ConfigError(f"{index}: expected an object weight_map")
    for tensor, name in found.items():
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise ConfigError(
                f"{index}: {tensor[:80]}: expected the name of a .safetensors file beside it, "
                f"got {str(name)[:80]!r}"
            )
    return found


def _tensors(
    path: Path,
    wanted: frozenset[str] | None,
    dtype: torch.dtype,
    device: torch.device,
    n_layers: int | None,
) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise MissingExtraError(
            "reading a checkpoint needs safetensors: pip install 'lccost[transformers]'"
        ) from None
    state = {}
    try:
        # only elements are put on a device, and meta has none
        place = "cpu" if device.type == "meta" else str(device)
        with safe_open(path, framework="pt", device=place) as file:
            names = set(file.keys())
            lost = sorted((wanted or frozenset()) - names)
            if lost:
                raise ConfigError(f"{path}: lacks {lost[0]}, which the index says it holds")
            for name in sorted(wanted or names):
                layer = _LAYER.search(name)
                if n_layers is not None and layer is not None and int(layer[1]) >= n_layers:
                    continue
                header = file.get_slice(name)
                if not header.get_dtype().startswith(("F", "BF")):
                    raise ConfigError(
                        f"{path}: {name} has type {header.get_dtype()}; quantised checkpoints are "
                        "priced, not run"
                    )
                if device.type == "meta":
                    state[name] = torch.empty(header.get_shape(), dtype=dtype, device=device)
                else:
                    state[name] = file.get_tensor(name).to(dtype)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a safetensors file: {str(error)[:200]}") from None
    return state


def _stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join experts stored one by one into [E, out, in], gate above up."""
    found: dict[str, Tensor] = {}
    experts: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in state.items():
        for stored, own in _SPELLINGS:
            name = name.replace(stored, own)
        match = _EXPERT.fullmatch(name)
        if match is None:
            found[name] = tensor
            continue
        part = _PARTS.get(match[3], match[3])
        experts.setdefault(match[1], {}).setdefault(part, {})[int(match[2])] = tensor
    for prefix, parts in experts.items():
        counts = {frozenset(numbers) for numbers in parts.values()}
        if counts != {frozenset(range(len(next(iter(counts)))))}:
            raise ConfigError(f"checkpoint: {prefix} lacks some of its experts")

        def whole(part: str, parts: dict[str, dict[int, Tensor]] = parts) -> Tensor:
            return torch.stack([parts[part][i] for i in range(len(parts[part]))])

        if "gate_proj" in parts:
            found[f"{prefix}.gate_up_proj"] = torch.cat((whole("gate_proj"), whole("up_proj")), 1)
        elif "up_proj" in parts:
            found[f"{prefix}.up_proj"] = whole("up_proj")
        if "down_proj" in parts:
            found[f"{prefix}.down_proj"] = whole("down_proj")
    return found


def _short_convolutions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kimi Linear stores three convolutions and its gate's parts beside them; its module has one
    convolution and a gate.
    """
    for name in [n for n in state if n.endswith(".q_conv1d.weight")]:
        prefix = name.removesuffix("q_conv1d.weight")
        parts = [f"{prefix}{x}_conv1d.weight" for x in "qkv"]
        missing = [p for p in parts if p not in state]
        if missing:
            raise ConfigError(f"checkpoint: expected a tensor {missing[0]}, got none of that name")
        state[f"{prefix}conv1d.weight"] = torch.cat([state.pop(p) for p in parts])
        for part in ("A_log", "dt_bias", "f_a_proj.weight", "f_b_proj.weight"):
            if prefix + part in state:
                state[f"{prefix}forget_gate.{part}"] = state.pop(prefix + part)
    return state
