"""Read a Hugging Face ``config.json`` without trusting it.

``read_config`` turns a file into plain values and refuses what is no config (too large, binary,
nested without end, the same key twice). :class:`ConfigReader` hands out typed values by key, says
file, key, expected and got when one is wrong, and remembers which keys somebody asked for: a key
that decides what attention or the layers are, and that nobody asked for, must not be priced
silently.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from costmodel.errors import ConfigError

#: No real config.json is larger; weights and tokenizers are.
MAX_CONFIG_BYTES = 4 * 1024 * 1024
#: Largest whole number any key may hold (elements of one dimension, tokens).
MAX_INTEGER = 2**40
#: Deepest model that is believed.
MAX_LAYERS = 4096

# Words in a key that decide what is computed or cached. A key that holds one of them must be
# understood.
_STRUCTURAL = re.compile(
    r"attn|attention|window|chunk|kv|head|lora|mamba|ssm|conv|recur|rwkv|rnn|lru|linear|expert|moe"
    r"|router|index|compress|latent|sparse|layer_type|layers_type|block_type|layers_block|pattern"
    r"|hybrid|share|sliding|global|local|mla|state|delta|memory|hyper_conn|^hc_|ngram|mixer|retention"
    r"|_layers$|layer_config|per_layer|parallel|^n_groups$|expand"
)
# Words and names that never change what is computed or cached: training, numerics, positions,
# output.
_HARMLESS = re.compile(
    r"dropout|_pdrop|aux_loss|aux_alpha|jitter|init|_std|implementation|flash|scaling|multiplier"
    r"|softcap|soft_cap|logit|loss|dtype|token_id|token_index|_eps|epsilon|rope|rotary|theta|quantiz"
    r"|temperature|penalty|label|^output_|^use_cache|^_name|^transformers|^architectures|^auto_map"
    r"|norm_topk|topk_|^n_group$|topk_method|scoring_func|score_func|routed_scaling|vision|audio|image"
    r"|video|generat|beam|pruned|chunk_size_feed|softmax|scale_attn|query_pre_attn_scalar|mtp"
    r"|nextn|pretraining_tp|kernels|fused|mem_eff|_min$|_max$|_floor|_limit|act$|activation"
    r"|bidirectional|^ep_size|tensor_parallel|_lccost|torchscript|is_decoder|tie_|cross_attention"
    r"|max_position|max_length|seq_len|context_length|checkpointing|problem_type|^task_|^id2|2id$"
    r"|bos_|eos_|pad_|sep_|decoder_start|router_dtype|capacity|gradient|prefix|suffix|finetuning"
)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in pairs:
        if key in out:
            raise ConfigError(f"key {short(key)} stands there twice; keep one of them")
        out[key] = value
    return out


def short(value: object) -> str:
    """``repr`` of a value, cut to a length that fits an error message."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return f"an integer of about {value.bit_length() * 0.30103:.0f} digits"
    text = repr(value[:80] if isinstance(value, str | list) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_config(path: Path) -> dict[str, object]:
    """The object in a config file; raises ``ConfigError`` naming the file."""
    where = str(path)
    try:
        if not path.is_file():
            raise ConfigError(f"{where}: no such file, or not a regular file")
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{where}: {size:,} bytes; a config.json has at most {MAX_CONFIG_BYTES:,}. "
                "Is this the weights or the tokenizer?"
            )
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: not UTF-8 text, so not a config.json") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from None
    return parse_config(text, where)


def parse_config(text: str, where: str) -> dict[str, object]:
    """Parse the text of a config; ``where`` names it in errors. Accepts ``Infinity``, as real files
    do.
    """
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}: not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply for a config.json") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{where}: not a usable config.json: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where}: expected a JSON object with keys such as model_type, got {short(data)}"
        )
    return data


def frozen(value: object) -> object:
    """An immutable, hashable copy: objects become tuples of (key, value), lists tuples."""
    if isinstance(value, Mapping):
        return tuple((str(k), frozen(v)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(frozen(v) for v in value)
    return value


class ConfigReader:
    """Typed, recorded access to one JSON object of a config file.

    where    file name for messages; path  keys that lead to this object ("text_config.")
    lenient  the family was chosen by hand (``--assume``): unread keys are no error
    """

    __slots__ = ("_read", "_values", "lenient", "path", "where")

    def __init__(
        self, values: Mapping[str, object], where: str, path: str = "", *, lenient: bool = False
    ) -> None:
        self._values = values
        self._read: set[str] = set()
        self.where = where
        self.path = path
        self.lenient = lenient

    @property
    def values(self) -> Mapping[str, object]:
        """The object as it stands; counts nothing as read."""
        return self._values

    def error(self, key: str, expected: str, got: object) -> ConfigError:
        """The error for a value that cannot be used."""
        return ConfigError(f"{self.where}: {self.path}{key}: expected {expected}, got {short(got)}")

    def missing(self, key: str, expected: str) -> ConfigError:
        """The error for a key that must be there."""
        return ConfigError(f"{self.where}: {self.path}{key} is missing: expected {expected}")

    def has(self, key: str) -> bool:
        """Whether the key is there and not null; counts as read."""
        self._read.add(key)
        return self._values.get(key) is not None

    def _get(self, keys: tuple[str, ...]) -> tuple[str, object]:
        """The first key that is there and not null; all of them count as read."""
        self._read.update(keys)
        for key in keys:
            value = self._values.get(key)
            if value is not None:
                return key, value
        return keys[0], None

    def ignore(self, *keys: str) -> None:
        """Keys that are understood to change nothing that is priced."""
        self._read.update(keys)

    def optional_integer(
        self, *keys: str, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int | None:
        """The first key that is set, as a whole number; None when none is."""
        key, value = self._get(keys)
        if value is None:
            return None
        return self._whole(key, value, minimum, maximum)

    def _whole(self, key: str, value: object, minimum: int, maximum: int) -> int:
        expected = f"a whole number from {minimum} to {maximum:,}"
        if isinstance(value, float) and math.isfinite(value) and value == math.floor(value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(key, expected, value)
        return value

    def integer(
        self,
        *keys: str,
        default: int | None = None,
        minimum: int = 1,
        maximum: int = MAX_INTEGER,
    ) -> int:
        """As ``optional_integer``, with a default; without one the key is required."""
        value = self.optional_integer(*keys, minimum=minimum, maximum=maximum)
        if value is not None:
            return value
        if default is None:
            raise self.missing(keys[0], "a whole number")
        return default

    def flag(self, *keys: str, default: bool = False) -> bool:
        """A true/false key."""
        key, value = self._get(keys)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def number(self, *keys: str, default: float | None = None) -> float:
        """A finite number."""
        key, value = self._get(keys)
        if value is None:
            if default is None:
                raise self.missing(key, "a number")
            return default
        finite = isinstance(value, int | float) and not isinstance(value, bool)
        if not finite or not abs(cast(float, value)) <= 1e15:
            raise self.error(key, "a finite number", value)
        return float(cast(float, value))

    def text(self, *keys: str, default: str | None = None) -> str:
        """A string."""
        key, value = self._get(keys)
        if value is None:
            if default is None:
                raise self.missing(key, "a string")
            return default
        if not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def raw(self, key: str) -> object:
        """The value as it stands; counts as read."""
        self._read.add(key)
        return self._values.get(key)

    def optional_list(self, *keys: str) -> list[object] | None:
        """A list, or None."""
        key, value = self._get(keys)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.error(key, "a list", value)
        return value

    def optional_texts(self, *keys: str) -> tuple[str, ...] | None:
        """A list of strings, or None."""
        values = self.optional_list(*keys)
        if values is None:
            return None
        for value in values:
            if not isinstance(value, str):
                raise self.error(self._get(keys)[0], "a list of strings", value)
        return tuple(cast(list[str], values))

    def optional_integers(
        self, *keys: str, minimum: int = 0, maximum: int = MAX_INTEGER
    ) -> tuple[int, ...] | None:
        """A list of whole numbers, or None."""
        values = self.optional_list(*keys)
        if values is None:
            return None
        key = self._get(keys)[0]
        return tuple(self._whole(f"{key}[{i}]", x, minimum, maximum) for i, x in enumerate(values))

    def section(self, *keys: str) -> "ConfigReader | None":
        """A nested object, or None."""
        key, value = self._get(keys)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "an object", value)
        return ConfigReader(value, self.where, f"{self.path}{key}.", lenient=self.lenient)

    def items(self) -> tuple[tuple[str, object], ...]:
        """The whole object, immutable: nested objects are tuples of (key, value), lists tuples."""
        return cast(tuple[tuple[str, object], ...], frozen(self._values))

    def unread_structural(self) -> Iterator[str]:
        """Keys that decide layers, attention or state, hold something, and that nobody read."""
        for key, value in self._values.items():
            inert = value is None or value is False or value in (0, [], {}, "")
            if key in self._read or inert or _HARMLESS.search(key):
                continue
            if _STRUCTURAL.search(key):
                yield key
