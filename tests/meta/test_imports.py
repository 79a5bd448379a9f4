"""An import loads no more than needed: torch for the ops, little for the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import tq_fast.cli.app", ("torch", "transformers")),
        ("import tq_fast.ops", ("transformers", "torch._dynamo", "triton")),
    ],
)
def test_an_import_brings_no_more_than_it_needs(statement, absent):
    loaded = f"import sys; {statement}; print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert not set(absent) & set(answer.stdout.split())


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    import tq_fast

    with pytest.raises(AttributeError, match="module 'tq_fast' has no attribute 'transmit'"):
        _ = tq_fast.transmit
    assert set(tq_fast.__all__) <= set(dir(tq_fast))
