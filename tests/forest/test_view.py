"""A view computes what its model computes, and nothing of the model shows that it is there."""

from __future__ import annotations

import functools
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import tq_fast
from tests import zoo
from tests.test_speed_options import share_of_low
from tq_fast.forest.attention import NAME, attending
from tq_fast.forest.view import view_of

OPTIONS: dict[str, Any] = {"k": 4, "horizon": 3, "max_new_tokens": 6, "eos_token_id": ()}
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


def decode(model: Any, **options: Any) -> list[int]:
    result = tq_fast.decode([3, 1, 4], model, share_of_low, **{**OPTIONS, **options})
    return result.sequences[0].tolist()


@torch.no_grad()
def test_a_view_gives_the_logits_of_its_model_and_shares_its_weights() -> None:
    model = zoo.language_model("llama")
    view = view_of(model.train())
    assert not view.training and model.training
    assert torch.equal(view(TOKENS).logits, model.eval()(TOKENS).logits)
    before = view(TOKENS).logits
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2)
    torch.testing.assert_close(view(TOKENS).logits, 2 * before)
    assert all(a is b for a, b in zip(view.parameters(), model.parameters(), strict=True))


def test_a_view_attends_through_a_configuration_of_its_own() -> None:
    model = zoo.language_model("llama")
    view = attending(model)
    assert view.config is not model.config and view.config._attn_implementation == NAME
    assert view.model.layers[0].self_attn.config is view.config
    assert model.config._attn_implementation != NAME
    assert model.model.layers[0].self_attn.config is model.config


def test_what_is_bound_to_a_module_is_bound_to_its_view() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Linear(2, 2)
            self.known = [self.part, "name"]
            self.by_name = {"part": self.part}
            self.forward = functools.partial(Owner.run, self)
            self.method = self.part.forward

        def run(self, x: torch.Tensor) -> nn.Module:
            return self.part

    owner = Owner()
    view = view_of(owner)
    assert view.part is not owner.part
    assert view.known[0] is view.by_name["part"] is view.part is view(torch.ones(1))
    assert view.method.__self__ is view.part
    assert owner(torch.ones(1)) is owner.part is owner.known[0]


def test_models_that_share_a_configuration_decode_in_two_threads() -> None:
    config = zoo.language_model("llama").config
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
    alone = [decode(model) for model in models]
    found: dict[int, list[list[int]]] = {0: [], 1: []}

    def work(idx: int) -> None:
        for _ in range(3):
            found[idx].append(decode(models[idx]))

    threads = [threading.Thread(target=work, args=(idx,)) for idx in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [alone[0]] * 3, 1: [alone[1]] * 3}
    assert config._attn_implementation != NAME


def test_one_model_decodes_in_two_threads_while_a_third_runs_it() -> None:
    model = zoo.language_model("llama")
    alone = decode(model)
    truth = model(TOKENS).logits
    wrong: list[object] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            if not torch.equal(model(TOKENS).logits, truth):
                wrong.append("logits of the user's model")

    def work() -> None:
        for _ in range(3):
            if decode(model) != alone:
                wrong.append("tokens of a decode")

    watcher = threading.Thread(target=watch)
    workers = [threading.Thread(target=work) for _ in range(2)]
    watcher.start()
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    watcher.join()
    assert wrong == []


@pytest.mark.parametrize("way", ["dispatched", "part on disk", "on disk"])
def test_a_model_that_is_offloaded_gives_the_same_tokens(way: str, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = decode(zoo.language_model("llama"))
    model = zoo.language_model("llama")
    if way == "dispatched":
        model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    elif way == "on disk":
        model = accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))
    else:
        places = {name: "cpu" for name, _ in model.named_children()}
        del places["model"]
        places |= {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
        del places["model.layers"]
        places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
        model = accelerate.dispatch_model(
            model, places, main_device="cpu", offload_dir=str(tmp_path)
        )
        assert any(weight.is_meta for weight in model.parameters())
    assert decode(model) == expected


def test_an_offloaded_model_decodes_in_two_threads(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = decode(zoo.language_model("llama"))
    model = zoo.language_model("llama")
    model = accelerate.disk_offload(model, str(tmp_path), torch.device("cpu"))
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.extend(decode(model) for _ in range(3)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


@torch.no_grad()
def test_a_rotary_embedding_that_grows_in_a_view_leaves_the_models_own_alone() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = zoo.language_model("llama", rope_parameters=rope, max_position_embeddings=8)
    before = model.model.rotary_emb.inv_freq.clone()
    truth = model(TOKENS).logits
    view_of(model)(torch.arange(40)[None] % zoo.VOCAB_SIZE)
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert torch.equal(model(TOKENS).logits, truth)


def test_a_container_that_holds_itself_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.known = [model]
    model.known.append(model.known)
    view = view_of(model)
    assert view.known[0] is view


def test_results_made_in_inference_mode_may_be_trained_on() -> None:
    model = zoo.language_model("llama")
    with torch.inference_mode():
        result = tq_fast.decode([3, 1, 4], model, share_of_low, **OPTIONS)
    assert not result.sequences[0].is_inference()
    assert not any(step.q.is_inference() for step in result.traces[0])
