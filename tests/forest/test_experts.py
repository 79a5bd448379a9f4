"""Mixtures of experts whose passes can be captured: what runs them, and that nothing shows it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.integrations.moe import ExpertsInterface

from tests import zoo
from tests.simulated_device import move, simulated_device
from tq_fast.forest import experts
from tq_fast.forest.attention import attending
from tq_fast.forest.experts import QuietExperts
from tq_fast.forest.language import LanguageForest

MIXTURES = ("mixtral", "gpt-oss")
SIZES: dict[str, Any] = {
    "num_trees": 1,
    "num_rows": 3,
    "prefix_capacity": 8,
    "branch_capacity": 4,
    "backend": None,
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The implementations that ran, one after the other."""
    names: list[str] = []

    def noted(name: str, forward: Any) -> Any:
        def note(*args: Any, **options: Any) -> Any:
            names.append(name)
            return forward(*args, **options)

        return note

    for name, forward in list(ExpertsInterface._global_mapping.items()):
        monkeypatch.setitem(ExpertsInterface._global_mapping, name, noted(name, forward))
    return names


def depth_logits(model: Any) -> tuple[LanguageForest, torch.Tensor]:
    """Run a depth of three roll-outs; return the logits after it."""
    forest = LanguageForest(model, **SIZES)
    forest.prefill(0, [3, 1, 4])
    device = forest.device
    tree = torch.zeros(3, dtype=torch.int64, device=device)
    forest.forward_rows(torch.tensor([5, 6, 7], device=device), start=0, tree=tree)
    logits = forest.forward_depth(
        torch.tensor([[2], [8], [9]], device=device),
        depth=torch.tensor([1], device=device),
        tree=tree,
        lengths=torch.tensor([3], device=device),
    )
    return forest, logits


@pytest.mark.parametrize("architecture", MIXTURES)
@torch.no_grad()
def test_a_depth_on_a_device_runs_experts_for_which_the_host_does_not_wait(
    architecture: str, ran: list[str]
) -> None:
    model = zoo.language_model(architecture)
    before = model.config._experts_implementation
    with simulated_device():
        forest, logits = depth_logits(move(copy.deepcopy(model)))
        logits = logits.cpu()
    num_layers = model.config.num_hidden_layers
    assert "batched_mm" in ran
    assert ran[-num_layers:] == ["batched_mm"] * num_layers
    assert "batched_mm" not in ran[:-num_layers]
    assert forest.model.config._experts_implementation == before
    assert forest.source.config._experts_implementation == before
    ran.clear()
    torch.testing.assert_close(logits, depth_logits(model)[1])
    assert "batched_mm" not in ran


@pytest.mark.parametrize("chosen", ["batched_mm", "deepgemm", "sonicmoe"])
def test_what_the_user_has_chosen_stays(chosen: str) -> None:
    model = zoo.language_model("mixtral").to("meta")
    model.config._experts_implementation_internal = chosen
    view = attending(model)
    with QuietExperts(view).running(3):
        assert view.config._experts_implementation == chosen


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        (torch.bfloat16, (9, 0), "grouped_mm"),
        (torch.bfloat16, (10, 0), "grouped_mm"),
        (torch.bfloat16, (8, 0), "batched_mm"),
        (torch.bfloat16, (12, 0), "batched_mm"),
        (torch.float16, (9, 0), "batched_mm"),
        (torch.float32, (9, 0), "batched_mm"),
    ],
)
def test_a_card_that_groups_by_itself_does_so(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    capability: tuple[int, int],
    expected: str,
) -> None:
    class OnCard:
        """Stands for expert weights on a GPU."""

        is_cuda, device, nbytes = True, torch.device("cuda", 0), 8

        def __init__(self) -> None:
            self.dtype = dtype

        def __getitem__(self, idx: int) -> OnCard:
            return self

    monkeypatch.setattr(experts, "_weights", lambda layer: [OnCard()])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = zoo.language_model("mixtral")
    model.config._experts_implementation_internal = "grouped_mm"
    view = attending(model)
    with QuietExperts(view).running(3):
        assert view.config._experts_implementation == expected
        assert model.config._experts_implementation == "grouped_mm"
    assert view.config._experts_implementation == "grouped_mm"


def test_weights_are_not_copied_beyond_measure() -> None:
    view = attending(zoo.language_model("mixtral").to("meta"))
    before = view.config._experts_implementation
    largest = max(w[0].nbytes for w in view.model.layers[0].mlp.experts.parameters())
    most = experts._MOST_COPIED // (2 * largest)
    with QuietExperts(view).running(most):
        assert view.config._experts_implementation == "batched_mm"
    with QuietExperts(view).running(most + 1):
        assert view.config._experts_implementation == before
