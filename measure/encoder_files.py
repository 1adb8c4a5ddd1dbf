"""Files of a local LLMLingua-2 encoder: sizes, names and shapes; importing this loads no torch.

A folder holds an ``XLMRobertaForTokenClassification`` with two classes as transformers saves it:
``config.json`` and ``model.safetensors``. Pickles are never opened.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

from costmodel.errors import ConfigError, MissingExtraError
from costmodel.hf_config import ConfigReader, read_config
from costmodel.methods.llmlingua2 import Encoder

#: Behind this word, a folder is loaded by the package of that name.
PACKAGE = "llmlingua"


def split_encoder(text: str) -> tuple[bool, Path]:
    """Whether ``--encoder`` names the package, and the folder."""
    prefix, colon, rest = text.partition(":")
    if colon and prefix == PACKAGE:
        return True, Path(rest)
    return False, Path(text)


@functools.cache
def checked_encoder(folder: Path) -> Encoder:
    """Sizes of the encoder in ``folder``; only headers are read.

    Raises ``ConfigError`` for what is no such encoder, ``MissingExtraError`` without safetensors.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise ConfigError(
            f"llmlingua2: expected config.json and model.safetensors of an encoder in {folder}"
        )
    encoder = _sizes(folder)
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise MissingExtraError(
            "reading an encoder needs safetensors: pip install 'lccost[transformers]'"
        ) from None
    try:
        with safe_open(path, framework="np") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a safetensors file: {str(error)[:200]}") from None
    for name, shape in shapes(encoder):
        parts = theirs(name)
        missing = [x for x in parts if x not in found]
        if missing:
            raise ConfigError(f"llmlingua2: {path} has no tensor {missing[0]}")
        each = [shape[0] // len(parts), *shape[1:]]
        odd = [x for x in parts if list(found[x]) != each]
        if odd:
            raise ConfigError(
                f"llmlingua2: {path} has {odd[0]} of {list(found[odd[0]])}, expected {name} of "
                f"{list(shape)} in all, as {len(parts)} alike"
            )
    return encoder


def _sizes(folder: Path) -> Encoder:
    where = folder / "config.json"
    c = ConfigReader(read_config(where), str(where))
    kind = c.text("model_type")
    if kind != "xlm-roberta":
        raise c.error("model_type", "xlm-roberta, a token classifier", kind)
    n_heads = c.integer("num_attention_heads")
    d_model = c.integer("hidden_size")
    if d_model % n_heads:
        raise c.error("num_attention_heads", f"a divisor of hidden_size ({d_model})", n_heads)
    return Encoder(
        n_layers=c.integer("num_hidden_layers", maximum=1000),
        d_model=d_model,
        d_ff=c.integer("intermediate_size"),
        n_heads=n_heads,
        vocab_size=c.integer("vocab_size"),
        n_positions=c.integer("max_position_embeddings", minimum=514),
    )


def shapes(e: Encoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All tensors; a bias follows each matrix and norm of a layer."""
    d, f = e.d_model, e.d_ff
    yield "words", (e.vocab_size, d)
    yield "positions", (e.n_positions, d)
    yield "types", (1, d)
    named: list[tuple[str, tuple[int, ...]]] = [("norm", (d,))]
    for i in range(e.n_layers):
        named += [
            (f"{i}.qkv", (3 * d, d)),
            (f"{i}.out", (d, d)),
            (f"{i}.norm", (d,)),
            (f"{i}.up", (f, d)),
            (f"{i}.down", (d, f)),
            (f"{i}.norm2", (d,)),
        ]
    named.append(("head", (2, d)))
    for name, shape in named:
        yield name, shape
        yield f"{name}_bias", shape[:1]


#: Our names -> those of transformers' XLMRobertaForTokenClassification (several are stacked).
_NAMES = {
    "words": ("roberta.embeddings.word_embeddings",),
    "positions": ("roberta.embeddings.position_embeddings",),
    "types": ("roberta.embeddings.token_type_embeddings",),
    "norm": ("roberta.embeddings.LayerNorm",),
    "head": ("classifier",),
}
_LAYER_NAMES = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "out": ("attention.output.dense",),
    "norm": ("attention.output.LayerNorm",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
    "norm2": ("output.LayerNorm",),
}


def theirs(name: str) -> list[str]:
    """Names in a checkpoint of one of our tensors."""
    suffix = "bias" if name.endswith("_bias") else "weight"
    name = name.removesuffix("_bias")
    if name in _NAMES:
        return [f"{x}.{suffix}" for x in _NAMES[name]]
    layer, _, part = name.partition(".")
    return [f"roberta.encoder.layer.{layer}.{x}.{suffix}" for x in _LAYER_NAMES[part]]
