"""The example of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")
def test_the_example_with_the_embedded_models_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (example,) = [block for block in blocks if "load_tiny_world" in block]
    scope: dict[str, object] = {}
    exec(example, scope)
    text, divergence = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert text and float(divergence) > 0
    assert len(scope["result"].sequences[0]) <= 12
