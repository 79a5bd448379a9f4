"""An installation loads what it built, and gives a reason in words for what it did not build."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tq_fast import _native


def test_common_module_is_inside_the_package():
    module = _native.load_common()
    assert Path(module.__file__).parent == Path(_native.__file__).parent


def test_missing_library_is_refused_with_a_sentence_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(_native, "_PACKAGE_FOLDER", tmp_path)
    refusal = _native._load("cpu")
    assert "_tq_fast_cpu.so" in refusal and "TQ_FAST_BUILD=cpu" in refusal


def test_broken_library_is_refused_not_raised(tmp_path, monkeypatch):
    (tmp_path / "_tq_fast_cpu.so").write_bytes(b"not a library")
    monkeypatch.setattr(_native, "_PACKAGE_FOLDER", tmp_path)
    assert "could not be loaded" in _native._load("cpu")


def test_missing_common_module_is_an_import_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tq_fast._common", None)
    _native.load_common.cache_clear()
    with pytest.raises(ImportError, match="C\\+\\+ compiler"):
        _native.load_common()


def test_the_sources_use_no_macro_that_torch_2_11_lacks():
    """A build does not show one: later headers define it whatever TORCH_TARGET_VERSION says."""
    sources = Path(_native.__file__).parents[1] / "csrc"
    later = ("STABLE_TORCH_ERROR_CODE_CHECK",)
    for path in sources.rglob("*.*"):
        assert not [name for name in later if name in path.read_text()], path
