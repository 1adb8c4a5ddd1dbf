"""From a ``config.json`` to an :class:`~costmodel.architecture.Architecture`, by ``model_type``.

One module per kinship of families; only the one needed is imported. A family module has one function
``build(reader, model_type) -> Model`` that asks the reader for every key that decides layers, caches and
parameters. A key of that sort that it did not ask for is an error, so a new checkpoint with a new kind of
attention is refused and not priced as something it is not.
"""

from costmodel.families.common import Model as Model

#: model_type -> module in this package.
MODULES: dict[str, str] = {
    # attention and a dense MLP
    "llama": "dense",
    "mistral": "dense",
    "qwen2": "dense",
    "qwen3": "dense",
    "phi3": "dense",
}

#: Keys under which wrappers (vision, audio) keep the language model's own config.
TEXT_SECTIONS = ("text_config", "llm_config", "language_config")


def known_families() -> list[str]:
    """All ``model_type`` values that can be read."""
    return sorted(MODULES)
