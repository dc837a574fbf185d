"""A GGUF file -> a folder of bf16 safetensors, for the peers that cannot read the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from model.hub import ModelFiles


def write_folder(files: ModelFiles, target: Path) -> Path:
    """The same weights, unpacked as Headwater unpacks them, with the tokenizer it uses.

    Raises ImportError without transformers, which writes the config; OSError or ValueError when the
    file does not fit."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from model.weights.files import open_weights

    source = files.weights[0]
    config = AutoConfig.from_pretrained(str(source.parent), gguf_file=source.name)
    config.update(
        {
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]],
            "dtype": "bfloat16",
            "tie_word_embeddings": files.config.tie_word_embeddings,
        }
    )
    config.save_pretrained(str(target))
    weights = open_weights(list(files.weights), files.config)
    tensors = {name: weights.read(name).to_torch(torch.bfloat16) for name in weights.shapes}
    weights.close()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(files.folder / "tokenizer.json", target / "tokenizer.json")
    own = files.folder / "tokenizer_config.json"
    settings = json.loads(own.read_text()) if own.is_file() else {}
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    (target / "tokenizer_config.json").write_text(json.dumps(settings))
    return target
