"""The prediction of a measured point: the same key, the same layers, the profile of its device."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from costmodel.architecture import Architecture
from costmodel.errors import ConfigError, LccostError
from costmodel.hardware import HardwareProfile, load_hardware
from costmodel.methods.parse import parse_method
from costmodel.predict import predict
from costmodel.registry import load_architecture
from costmodel.workload import Workload


def first_layers(architecture: Architecture, n_layers: int | None) -> Architecture:
    """The model cut to its first ``n_layers`` blocks; embedding, final norm and head stay whole."""
    if n_layers is None or n_layers == architecture.n_layers:
        return architecture
    if not 1 <= n_layers <= architecture.n_layers:
        raise ConfigError(
            f"layers: {architecture.name} has {architecture.n_layers}, got {n_layers}"
        )
    return replace(architecture, layers=architecture.layers[:n_layers])


def predict_record(
    fields: Mapping[str, Any],
    hardware: HardwareProfile | None = None,
    architecture: Architecture | None = None,
) -> dict[str, Any]:
    """The result row of the point that a record's key fields name.

    ``hardware`` overrides the record's ``gpu``; ``architecture`` its ``model`` (a file that
    is not bundled).
    Raises ``LccostError`` where the key names something unknown.
    """
    missing = [k for k in ("model", "method_spec", "batch", "context_tokens") if not fields.get(k)]
    if missing:
        raise ConfigError(f"the record lacks {', '.join(missing)}")
    model = architecture or load_architecture(str(fields["model"]))
    prediction = predict(
        first_layers(model, fields.get("layers")),
        parse_method(str(fields["method_spec"])),
        Workload.of(fields["batch"], fields["context_tokens"], fields.get("output_tokens") or 1),
        hardware or load_hardware(str(fields.get("gpu"))),
        dtype=fields.get("dtype"),
        weight_dtype=fields.get("weight_dtype") or "checkpoint",
        level=fields.get("level") or "ideal",
        tp=int(fields.get("tp") or 1),
        engine=fields.get("engine"),
        solve=False,
    )
    return prediction.rows()[0]


class _Row(Protocol):
    @property
    def values(self) -> Mapping[str, Any]: ...


def profiles_of(rows: Iterable[_Row], given: Iterable[str] = ()) -> list[HardwareProfile]:
    """Profiles of the devices that records name, and those given by hand; a device whose profile
    cannot be found is left out (its numbers are shown, its roofline is not).
    """
    found = {p.name: p for p in map(load_hardware, given)}
    for name in dict.fromkeys(str(r.values.get("gpu")) for r in rows):
        if name not in found:
            try:
                profile = load_hardware(name)
            except LccostError:
                continue
            found.setdefault(profile.name, profile)
    return list(found.values())
