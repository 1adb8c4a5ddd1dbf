"""What is measured: one point, its key fields, and the hash that says two records are of one."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from costmodel.architecture import Architecture
from costmodel.errors import ConfigError, NotApplicableError
from costmodel.methods.stack import MethodStack
from costmodel.results import key_fields
from measure.devices.names import cuda_index, is_device_name
from measure.encoder_files import split_encoder

#: Formats of weights that can be run, besides the plain ones.
PACKED_WEIGHT_DTYPES = ("int8", "int4")
ENGINES = ("torch", "lccost", "transformers")
Realisation = Literal["reference", "best"]
#: The level a realisation is compared with.
LEVEL_OF_REALISATION: Mapping[str, str] = {"reference": "reference", "best": "ideal"}

#: Fields that make a record's key: what was run, and how; not which profile predicts it.
_IDENTITY = (
    *("model", "method_spec", "method_parameters", "level", "engine", "tp", "dtype"),
    *("weight_dtype", "kv_dtype", "batch", "context_tokens", "output_tokens", "layers"),
    *("device", "realisation", "threads", "seed", "n_parameters", "weights"),
)
#: Fields that are in the key where they are set, so that older keys stay.
_RARE = ("encoder",)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurePoint:
    """One point.

    context_tokens   S = T: the prefilled prompt, and the cached tokens that the timed step reads
    output_tokens    room made for generated tokens; at least one step is run in it
    layers           run only the first so many; None: all
    device           cpu or cuda:N; with tp > 1 rank r runs on cuda:r
    tp               processes that share the model; each is one GPU of the prediction
    gpu              name or path of the hardware profile that predicts this point
    model_source     what ``costmodel.registry.load_config`` finds the config under
    weights          folder of a local checkpoint (safetensors); None: random weights
    encoder          local encoder of a method that shortens the prompt: a folder, or one behind
                     ``llmlingua:`` for the package; None: random weights
    weight_dtype     "checkpoint" (or ``dtype``): plain; "int8" or "int4": matrices packed so
    """

    architecture: Architecture
    stack: MethodStack
    context_tokens: int
    batch: int = 1
    output_tokens: int = 32
    dtype: str = "bf16"
    weight_dtype: str = "checkpoint"
    layers: int | None = None
    device: str = "cpu"
    engine: str = "torch"
    realisation: Realisation = "best"
    tp: int = 1
    threads: int = 1
    seed: int = 0
    gpu: str = "cpu"
    model_source: str = ""
    weights: str | None = None
    encoder: str | None = None

    def __post_init__(self) -> None:
        for name in ("context_tokens", "batch", "output_tokens", "threads", "tp"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.dtype not in ("fp32", "bf16", "fp16"):
            raise ConfigError(f"dtype: expected fp32, bf16 or fp16, got {self.dtype!r}")
        if self.weight_dtype not in ("checkpoint", self.dtype, *PACKED_WEIGHT_DTYPES):
            raise NotApplicableError(
                f"weight dtype: can be run as checkpoint, {self.dtype}, "
                f"{' or '.join(PACKED_WEIGHT_DTYPES)}, got {self.weight_dtype!r}"
            )
        if self.packs_weights and (self.tp > 1 or self.engine == "transformers"):
            raise NotApplicableError(
                f"weight dtype: {self.weight_dtype} is run with tp 1 on --engine torch or lccost"
            )
        total = self.architecture.n_layers
        if self.layers is not None and not 1 <= self.layers <= total:
            raise ConfigError(
                f"layers: expected 1 to {total} for {self.architecture.name}, got {self.layers}"
            )
        if not is_device_name(self.device):
            raise ConfigError(f"device: expected cpu or cuda:N, got {self.device!r}")
        self._check_engine()
        if self.tp > 1 and self.device != "cpu" and cuda_index(self.device) != 0:
            raise ConfigError(
                f"device: with tp {self.tp} ranks take cuda:0 to cuda:{self.tp - 1}, "
                f"got {self.device!r}"
            )
        self.architecture.sharded(self.tp)
        if self.architecture.quantization is not None:
            raise NotApplicableError(
                f"{self.architecture.name} has a quantised checkpoint; measured points hold "
                f"weights in {self.dtype}"
            )

    def _check_engine(self) -> None:
        if self.engine not in ENGINES:
            raise NotApplicableError(
                f"engine: points run on {', '.join(ENGINES)}, got {self.engine!r}"
            )
        if self.engine == "lccost" and self.realisation == "reference":
            raise NotApplicableError(
                "the kernels of --engine lccost are the best form; --engine torch runs the "
                "published operations"
            )
        if self.engine == "transformers":
            self._check_transformers()

    def _check_transformers(self) -> None:
        names = {method.NAME for method in self.stack.methods}
        if self.realisation == "best" and names != {"full"}:
            raise NotApplicableError(
                f"{self.stack.spec}: transformers has one form of this cache: --realisation "
                "reference"
            )
        if self.tp > 1:
            raise NotApplicableError("tensor parallel points run on --engine torch or lccost")
        if self.weights is not None:
            raise NotApplicableError("--engine transformers runs random weights only")

    @property
    def packs_weights(self) -> bool:
        """Whether matrices are held in fewer bits than the compute type."""
        return self.weight_dtype in PACKED_WEIGHT_DTYPES

    @property
    def prompt_tokens(self) -> int:
        """Tokens that reach the model; fewer than the context where the prompt is compressed."""
        return int(self.stack.prompt_tokens(float(self.context_tokens)))

    @property
    def executed(self) -> Architecture:
        """The layers that are run; embedding, final norm and head stay whole."""
        if self.layers is None:
            return self.architecture
        return replace(self.architecture, layers=self.architecture.layers[: self.layers])

    @property
    def fields(self) -> dict[str, Any]:
        """The key fields of a record; predictions have the same names."""
        return {
            **key_fields(
                architecture=self.architecture,
                method=self.stack,
                gpu=self.gpu,
                level=LEVEL_OF_REALISATION[self.realisation],
                engine=self.engine,
                tp=self.tp,
                dtype=self.dtype,
                weight_dtype=self.weight_dtype,
                batch=self.batch,
                context_tokens=self.context_tokens,
                output_tokens=self.output_tokens,
            ),
            "layers": self.executed.n_layers,
            "n_layers_model": self.architecture.n_layers,
            "device": self.device,
            "realisation": self.realisation,
            "threads": self.threads,
            "seed": self.seed,
            "weights": "random" if self.weights is None else "checkpoint",
            **({} if self.encoder is None else {"encoder": encoder_name(self.encoder)}),
        }

    @property
    def record_key(self) -> str:
        """16 hex digits that stand for the point, the same on every machine."""
        return record_key(self.fields)


def encoder_name(encoder: str) -> str:
    """How an encoder is run, and the name of its folder."""
    by_package, folder = split_encoder(encoder)
    return f"{'llmlingua' if by_package else 'checkpoint'} {folder.name}"


def record_key(fields: Mapping[str, Any]) -> str:
    """Hash of the fields that say what was run and how."""
    identity = {k: fields.get(k) for k in _IDENTITY}
    identity |= {k: fields[k] for k in _RARE if fields.get(k) is not None}
    text = json.dumps(identity, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
