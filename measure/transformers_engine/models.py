"""A transformers model of a point's layers, with random weights."""

import contextlib
import functools
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers

from costmodel.architecture import Architecture
from costmodel.errors import NotApplicableError
from measure.engine import TORCH_DTYPES

#: Names under which configs count their layers.
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_TEXT = "text_config"


def model_config(source: Mapping[str, Any], executed: Architecture, n_layers: int) -> Any:
    """The config object of the first ``executed.n_layers`` of ``n_layers`` layers.

    Of a multimodal model its text part. Raises ``NotApplicableError`` for a family that this
    transformers does not know.
    """
    text = source.get(_TEXT)
    values = _decoded(text if isinstance(text, Mapping) and "hidden_size" in text else source)
    values = {k: v for k, v in values.items() if k not in ("auto_map", "architectures", "_lccost")}
    family = values.pop("model_type", executed.family)
    if executed.n_layers != n_layers:
        for key, value in values.items():
            if isinstance(value, list) and len(value) == n_layers:
                values[key] = value[: executed.n_layers]
        for key in _DEPTHS:
            if key in values:
                values[key] = executed.n_layers
    try:
        return transformers.AutoConfig.for_model(family, **values)
    except Exception as error:  # whatever its validators raise
        raise NotApplicableError(
            f"transformers {transformers.__version__} cannot make a {family} config: "
            f"{str(error).splitlines()[0][:200]}"
        ) from None


@functools.lru_cache(maxsize=1)
def random_model(
    config_json: str, executed: Architecture, dtype: str, device: torch.device, seed: int
) -> Any:
    """The model on ``device``; ``config_json`` is ``model_config``'s, as ``to_json_string`` gives
    it. The last one is kept for the next point.

    Raises ``NotApplicableError`` where transformers builds another number of parameters than the
    model has: a figure of another model must not stand under this name.
    """
    config = transformers.AutoConfig.for_model(**_values(config_json))
    torch.manual_seed(seed)
    with quiet(), torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[dtype])
    found = sum(p.numel() for p in model.parameters())
    if found != executed.n_parameters:
        raise NotApplicableError(
            f"transformers builds {found:,} parameters where {executed.name} with "
            f"{executed.n_layers} layers has {executed.n_parameters:,}"
        )
    return model.eval()


def _decoded(value: Any) -> Any:
    """Numbers that JSON has no word for, which the library writes as ``{"__float__": ...}``."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {k: _decoded(v) for k, v in value.items()}
    return [_decoded(v) for v in value] if isinstance(value, list) else value


def _values(config_json: str) -> dict[str, Any]:
    values: dict[str, Any] = _decoded(json.loads(config_json))
    values.pop("architectures", None)
    return values


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the library's advice on speed and kernels."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)
