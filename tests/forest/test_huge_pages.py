"""Memory in huge pages: the same numbers, asked for once, and only memory of the tensors' own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tq_fast
from tests import zoo
from tq_fast.forest import huge_pages
from tq_fast.forest.cache import ForestCache
from tq_fast.forest.language import LanguageForest

Asked = list[tuple[int, int, int]]
MB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux where memory is")
SIZES = {"num_trees": 1, "num_rows": 1, "prefix_capacity": 4, "branch_capacity": 1}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What the system is asked for: address, bytes, advice."""
    calls: Asked = []
    monkeypatch.setattr(huge_pages, "_page_size", lambda: 2 * MB)
    monkeypatch.setattr(huge_pages, "_madvise", lambda: lambda *call: calls.append(call))
    return calls


def huge_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


def test_weights_are_gathered_once_and_keep_their_numbers(asked: Asked) -> None:
    model = nn.Sequential(nn.Linear(1500, 1500), nn.Linear(1500, 1500))
    before = [weight.clone() for weight in model.parameters()]
    huge_pages.gather_weights(model)
    first = len(asked)
    assert first > 0
    blocks = [(w.data_ptr(), w.data_ptr() + w.nbytes) for w in model.parameters()]
    low, high = min(begin for begin, _ in blocks), max(end for _, end in blocks)
    for at, size, advice in asked:
        assert at % size == 0 and size == 2 * MB and advice == 25
        assert low <= at and at + size <= high
        near = huge_pages._GAP
        assert any(begin - near < at + size and at < end + near for begin, end in blocks)
    huge_pages.gather_weights(model)
    assert len(asked) == first
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def test_what_is_smaller_than_a_page_is_left_alone(asked: Asked) -> None:
    huge_pages.gather_weights(nn.Linear(4, 4))
    assert not asked


def test_a_cache_asks_for_its_buffers_before_anybody_touches_them(asked: Asked) -> None:
    cache = ForestCache(num_trees=1, num_rows=1, prefix_capacity=9000, branch_capacity=1)
    cache.current_pass = cache.branch_pass(
        tree=torch.zeros(1, dtype=torch.int64), start=0, num_tokens=1
    )
    cache.update(torch.ones(1, 8, 1, 64), torch.ones(1, 8, 1, 64), 0)
    assert asked and {advice for _, _, advice in asked} == {14}


def test_a_forest_gathers_weights_with_its_layers_alone(asked: Asked, monkeypatch) -> None:
    models: list[nn.Module] = []
    monkeypatch.setattr("tq_fast.forest.language.gather_weights", models.append)
    model = zoo.language_model("llama")
    LanguageForest(model, **SIZES, backend=None, cpu_layers=False)
    assert not models
    LanguageForest(model, **SIZES, backend=None)
    assert models == [model]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    zoo.language_model("llama").save_pretrained(tmp_path)
    return tmp_path


def are_mapped(model: nn.Module) -> set[bool]:
    files = huge_pages._mapped_files()
    return {any(a <= w.data_ptr() < b for a, b in files) for w in model.parameters()}


@linux
def test_weights_in_a_file_are_copied_where_tq_fast_loads_them(saved: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(saved)
    assert are_mapped(theirs) == {True}, "the test needs what transformers does"
    decoder = tq_fast.TransferDecoder(saved, lambda prompts, responses: [0.0] * len(responses))
    ours = decoder.session.languages["baseline"]
    assert are_mapped(ours) == {huge_pages._page_size() == 0}
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)


@linux
def test_weights_stay_in_their_file_where_memory_is_short(saved: Path, asked: Asked, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(saved)
    monkeypatch.setattr(huge_pages, "_available_bytes", lambda: 1000)
    huge_pages.copy_from_files(model)
    assert are_mapped(model) == {True}
    monkeypatch.undo()
    assert huge_pages._available_bytes() > MB


def test_a_system_that_refuses_or_has_none_changes_nothing(monkeypatch) -> None:
    model = nn.Linear(1500, 1500)
    before = model.weight.clone()
    monkeypatch.setattr(huge_pages, "_page_size", lambda: 0)
    monkeypatch.setattr(huge_pages, "_madvise", lambda: pytest.fail("nothing is to be asked"))
    huge_pages.gather_weights(model)
    assert torch.equal(model.weight, before)


@pytest.mark.skipif(huge_pages._page_size() == 0, reason="this system has no huge pages")
def test_the_system_gives_huge_pages() -> None:
    model = nn.Linear(4000, 4000)
    before = huge_bytes()
    huge_pages.gather_weights(model)
    gained = huge_bytes() - before
    assert gained >= model.weight.nbytes - 4 * MB or _cannot_collapse()


def _cannot_collapse() -> bool:
    """Whether the kernel of this system is older than 6.1, or has no free huge page."""
    buffer = torch.ones(8 * MB, dtype=torch.uint8)
    at = -(-buffer.data_ptr() // (2 * MB)) * 2 * MB
    return huge_pages._madvise()(at, 2 * MB, 25) != 0
