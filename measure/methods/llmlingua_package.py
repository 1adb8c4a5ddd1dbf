"""LLMLingua-2 by Microsoft's package ``llmlingua``, with a model in a local folder.

The package works on text: the tokens of a prompt are written out by the encoder's own tokenizer,
compressed, and read again. How many tokens come back is the package's affair (it keeps whole words
and sets a threshold per chunk); the model is given exactly floor(rate S) of them, the surplus cut
off and what lacks repeated from the front, so that a record is of the tokens its key says. Nothing
is fetched and no code of a model's folder runs.
"""

import importlib
import os
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from costmodel.errors import MeasurementError, MissingExtraError
from costmodel.methods.llmlingua2 import LLMLingua2
from measure.encoder_files import PACKAGE


@final
class LLMLinguaPackageCompressor:
    """The package's ``PromptCompressor``; the same calls as ``LLMLingua2Compressor``."""

    NAME: ClassVar[str] = "llmlingua2"

    def __init__(self, method: LLMLingua2, folder: Path, *, device: torch.device) -> None:
        self.method, self.device = method, device
        self.kept: list[int] = []
        self.compressor = _package().PromptCompressor(
            model_name=str(folder),
            device_map=str(device),
            model_config={"trust_remote_code": False, "use_safetensors": True},
            use_llmlingua2=True,
        )
        self.folder = folder

    @property
    def nbytes(self) -> int:
        """Bytes of the model's weights."""
        found = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for p in self.compressor.model.parameters()
        }
        return sum(found.values())

    @property
    def source(self) -> str:
        """What compressed, and how many tokens it kept of the last prompt before they were cut."""
        kept = f"; kept {', '.join(map(str, self.kept))} tokens" if self.kept else ""
        return f"llmlingua {_version()} with {self.folder.name}{kept}"

    def compress(self, tokens: Tensor) -> Tensor:
        """Tokens [B, S] -> S' = max(1, floor(rate S)) of each [B, S']."""
        n = int(self.method.prompt_tokens(float(tokens.shape[1])))
        tokenizer = self.compressor.tokenizer
        rows = []
        self.kept = []
        for row in (tokens % len(tokenizer)).tolist():
            text = tokenizer.decode(row, skip_special_tokens=True)
            found = self.compressor.compress_prompt([text], rate=self.method.kept_rate)
            ids = tokenizer(found["compressed_prompt"], add_special_tokens=False)["input_ids"]
            self.kept.append(len(ids))
            ids = ids or row[:1]
            rows.append((ids * -(-n // len(ids)))[:n])
        return torch.tensor(rows, dtype=tokens.dtype, device=tokens.device)


def _package() -> Any:
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    try:
        return importlib.import_module(PACKAGE)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"--encoder llmlingua:FOLDER needs the package: pip install llmlingua ({error})"
        ) from None
    except Exception as error:  # it fetches a vocabulary when it is imported
        raise MeasurementError(
            f"llmlingua cannot be imported: {type(error).__name__}: {str(error)[:200]}"
        ) from None


def _version() -> str:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "(version unknown)"
