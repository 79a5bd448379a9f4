"""The tests of an op in tests/ops, run over its Triton kernel by Triton's interpreter on CPU.

The interpreter is chosen when triton is imported, so it gets a process of its own. Outputs and
scratch memory are poisoned there: torch fills what `torch.empty` returns with NaN.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

_REPOSITORY = Path(__file__).parents[2]
# The interpreter keeps bfloat16 as its bits, and its tl.dot multiplies them (triton 3.6 to 3.9). It
# runs the exclusive or in tl.topk as a Python loop over the elements. Each call of a device
# function replaces the functions of triton.language again, which is more than half of a kernel's
# time. What it replaces stays until the launch ends, so once for each module is enough.
_PROGRAM = """
import sys
import numpy as np, pytest, torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import (
    GridExecutor, InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle
)

def widen(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)

dot = InterpreterBuilder.create_dot
InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)

reduce = ReduceOps.apply_impl

def reduce_quickly(self, values):
    if self.combine_fn is not tl.standard._xor_combine:
        return reduce(self, values)
    (value,) = values
    data = np.bitwise_xor.reduce(value.handle.data, axis=self.axis, keepdims=self.keep_dims)
    return (self.to_tensor(data, value.dtype),)

ReduceOps.apply_impl = reduce_quickly

replaced_for = set()
launch = GridExecutor.__call__

def launch_anew(self, *arguments, **options):
    replaced_for.clear()
    launch(self, *arguments, **options)

def call_device_function(self, *arguments, **options):
    module = self.fn.__module__
    if module not in replaced_for:
        interpreter._patch_lang(self.fn)
        replaced_for.add(module)
    return self.rewrite()(*arguments, **options)

GridExecutor.__call__ = launch_anew
InterpretedFunction.__call__ = call_device_function
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
sys.exit(pytest.main(sys.argv[1:]))
"""


def run_op_tests(op: str, leave_out: str = "") -> int:
    """How many tests of `op` the interpreter passed; a failed or skipped one is an error here.

    `leave_out` names, for pytest's -k, tests that are only more of the same and take long.
    torch.compile cannot look into the interpreter, and rejections never reach a kernel.
    """
    chosen = "triton and not compiles_as_one_graph"
    if leave_out:
        chosen += f" and not ({leave_out})"
    tests = Path("tests") / "ops" / f"test_{op}.py"
    # Numpy would warn of each infinity, and these tests are full of them.
    options = ("-q", "-p", "no:cacheprovider", "--durations=0", "--disable-warnings")
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *options, str(tests), "-k", chosen],
        cwd=_REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1", "TQ_FAST_BACKEND": "auto"},
        capture_output=True,
        text=True,
        check=False,
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-8000:]
    assert "skipped" not in done.stdout and "xfailed" not in done.stdout, report[-8000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, report[-8000:]
    return int(passed[1])
