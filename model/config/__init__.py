"""DecoderConfig: one decoder, with flags for the families it can be.

Read from a Hugging Face `config.json` or from the metadata of a GGUF file. Nothing here imports
torch or opens a file.
"""

from model.config.gguf import from_gguf
from model.config.hf import from_hf
from model.config.types import (
    FAMILIES,
    SUPPORTED,
    DecoderConfig,
    RopeConfig,
    RopeKind,
    UnsupportedModel,
)

__all__ = [
    "FAMILIES",
    "SUPPORTED",
    "DecoderConfig",
    "RopeConfig",
    "RopeKind",
    "UnsupportedModel",
    "from_gguf",
    "from_hf",
]
