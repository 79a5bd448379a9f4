"""`forest_attention` and its mask function, called as transformers calls them."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from tests import zoo
from tests.ops.flash_stand_in import FLASH_ATTN, TORCH, FlashStandIns
from tq_fast import env
from tq_fast.errors import UnsupportedModel
from tq_fast.forest import ForestCache, attention, forest_attention
from tq_fast.forest.cache import PrefillPass
from tq_fast.forest.support import check_runs


def mask_of(mask_function, *, sliding_window: int | None = None, **options: object) -> object:
    config = types.SimpleNamespace(model_type="made-up", sliding_window=sliding_window)
    return attention._forest_mask(mask_function=mask_function, config=config, **options)


def test_a_causal_layer_has_no_window() -> None:
    assert mask_of(causal_mask_function) is None
    assert mask_of(causal_mask_function, sliding_window=5) is None


@pytest.mark.parametrize("window", [1, 2, 6, 4096])
def test_a_sliding_layer_has_its_window(window: int) -> None:
    function = sliding_window_causal_mask_function(window)
    assert mask_of(function, sliding_window=window) == window


@pytest.mark.parametrize(
    ("function", "window"),
    [
        (bidirectional_mask_function, None),
        (bidirectional_mask_function, 6),
        # A window that is not the one of the configuration.
        (sliding_window_causal_mask_function(5), 6),
        (sliding_window_causal_mask_function(7), 6),
        (sliding_window_causal_mask_function(6), None),
        (chunked_causal_mask_function(6, torch.zeros(1, dtype=torch.int64)), 6),
        (or_masks(causal_mask_function, bidirectional_mask_function), 6),
        (and_masks(bidirectional_mask_function, lambda b, h, q, k: k % 2 == 0), 6),
    ],
)
def test_other_patterns_are_refused_where_a_layer_attends_with_them(function, window) -> None:
    mask = mask_of(function, sliding_window=window)
    keys = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedModel, match="'made-up' asks for an attention pattern"):
        forest_attention(torch.nn.Identity(), keys, keys, keys, mask)


def test_a_pattern_that_transformers_cannot_index_is_refused() -> None:
    function = sliding_window_causal_mask_function(6)
    assert mask_of(function, sliding_window=6, use_vmap=True) != 6


def test_a_padding_mask_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="padding mask"):
        mask_of(causal_mask_function, attention_mask=torch.tensor([[0, 1, 1]]))


def test_a_padding_mask_that_masks_nothing_is_none() -> None:
    assert mask_of(causal_mask_function, attention_mask=torch.ones(1, 3)) is None


def test_an_argument_that_is_not_honoured_is_refused_by_name() -> None:
    keys = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedModel, match="Identity passes 'position_bias'"):
        forest_attention(torch.nn.Identity(), keys, keys, keys, None, position_bias=keys)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **options: object):
    """One prefill through `forest_attention`; rows are `[1, H, T, d]`."""
    cache = ForestCache(num_trees=1, num_rows=1, prefix_capacity=16, branch_capacity=1)
    with attention.running(cache, PrefillPass(0, 0), None):
        cache.update(keys, values, 0)
        out, weights = forest_attention(torch.nn.Identity(), query, keys, values, **options)
    assert weights is None
    return out


def test_harmless_arguments_and_those_that_say_no_are_taken(generator: torch.Generator) -> None:
    query = torch.randn(1, 4, 5, 8, generator=generator)
    keys, values = torch.randn(2, 1, 2, 5, 8, generator=generator)
    plain = attend(query, keys, values, attention_mask=None)
    same = attend(
        query,
        keys,
        values,
        attention_mask=None,
        dropout=0.0,
        is_causal=True,
        position_ids=torch.arange(5)[None],
        sliding_window=3,
        softcap=None,
        s_aux=None,
        made_up=None,
        other=False,
    )
    assert torch.equal(plain, same)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_prompt_is_attended_to_as_the_formula_says(
    generator: torch.Generator, window: int | None, softcap: float | None, with_sinks: bool
) -> None:
    query = torch.randn(1, 4, 7, 8, generator=generator)
    keys, values = torch.randn(2, 1, 2, 7, 8, generator=generator)
    sinks = torch.randn(4, generator=generator) if with_sinks else None
    out = attend(
        query, keys, values, attention_mask=window, scaling=0.7, softcap=softcap, s_aux=sinks
    )

    scores = 0.7 * query.double() @ keys.double().repeat_interleave(2, 1).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(7)
    seen = place <= place[:, None]
    if window is not None:
        seen &= place > place[:, None] - window
    scores = scores.masked_fill(~seen, -torch.inf)
    if with_sinks:
        sink = sinks.double().view(1, 4, 1, 1).expand(1, 4, 7, 1)
        scores = torch.cat([scores, sink], -1)
    shares = scores.softmax(-1)[..., :7]
    expected = (shares @ values.double().repeat_interleave(2, 1)).transpose(1, 2)
    # fp32 against fp64 at outputs of about 1.
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


# Inputs that only the reference takes: head size and dtype of a model, and strides of its queries.
ODD = {
    "head size": (torch.zeros(1, 1, 3, 264), "the head size is 264; the Triton kernel takes at"),
    "fp64": (
        torch.zeros(1, 1, 3, 8, dtype=torch.float64),
        "q is float64; the kernel takes",
    ),
    "strides": (torch.zeros(1, 1, 8, 3).transpose(2, 3), "the last axis of q is strided"),
}


@pytest.mark.parametrize("name", ODD)
def test_on_a_gpu_nothing_falls_to_the_reference_in_silence(
    name: str, monkeypatch: pytest.MonkeyPatch, environment: pytest.MonkeyPatch
) -> None:
    environment.delenv("TQ_FAST_BACKEND", raising=False)
    query, reason = ODD[name]
    keys = query.contiguous()
    on_cpu = attend(query, keys, keys, attention_mask=None)
    monkeypatch.setattr(attention, "_is_on_gpu", lambda tensor: True)
    with pytest.raises(UnsupportedModel, match=f"Identity cannot attend .* on a GPU: {reason}"):
        attend(query, keys, keys, attention_mask=None)
    with pytest.raises(UnsupportedModel, match="TQ_FAST_BACKEND=ref runs it here"):
        attend(query, keys, keys, attention_mask=None)
    environment.setenv("TQ_FAST_BACKEND", "ref")
    env.reload()
    assert torch.equal(attend(query, keys, keys, attention_mask=None), on_cpu)
    environment.delenv("TQ_FAST_BACKEND")
    env.reload()
    even = torch.zeros(1, 1, 3, 8)
    assert torch.equal(attend(even, even, even, attention_mask=None), even.transpose(1, 2))


@pytest.mark.filterwarnings("ignore:.*decoder layers run fused")
@pytest.mark.parametrize(
    ("options", "reason"),
    [({"head_dim": 264}, "the head size is 264"), ({"dtype": torch.float64}, "is float64")],
    ids=str,
)
def test_a_model_with_such_layers_is_refused_before_a_prompt_is_read(
    options: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"head_dim": 8, "dtype": torch.float32, **options}
    dtype = options.pop("dtype")
    model = zoo.language_model("llama", num_hidden_layers=1, **options).to(dtype)
    monkeypatch.setattr(attention, "_is_on_gpu", lambda tensor: True)
    with pytest.raises(UnsupportedModel, match=f"'llama' does not run .*LlamaAttention .*{reason}"):
        check_runs(model)


def test_keys_that_were_changed_after_they_were_stored_are_refused() -> None:
    query = torch.zeros(1, 4, 3, 8)
    keys = torch.zeros(1, 2, 3, 8)
    cache = ForestCache(num_trees=1, num_rows=1, prefix_capacity=4, branch_capacity=1)
    with (
        attention.running(cache, PrefillPass(0, 0), None),
        pytest.raises(UnsupportedModel, match="attends with 4 key-value heads, but stores 2"),
    ):
        cache.update(keys, keys, 0)
        repeated = keys.repeat(1, 2, 1, 1)
        forest_attention(torch.nn.Identity(), query, repeated, repeated, None)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 0.0, 2.0])])
@pytest.mark.parametrize("library", [FLASH_ATTN, TORCH])
def test_a_prompt_and_what_follows_it_go_to_flash_attention_where_it_is_there(
    library: str,
    sinks: torch.Tensor | None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query = torch.randn(1, 4, 9, 16, generator=generator).bfloat16()
    keys, values = torch.randn(2, 1, 2, 9, 16, generator=generator).bfloat16()

    def encode(backend: str | None) -> list[torch.Tensor]:
        cache = ForestCache(num_trees=2, num_rows=1, prefix_capacity=12, branch_capacity=1)
        outputs = []
        for start, end in ((0, 5), (5, 9)):
            new = [x[:, :, start:end] for x in (query, keys, values)]
            with attention.running(cache, PrefillPass(1, start), backend):
                cache.update(*new[1:], 0)
                out, _ = forest_attention(torch.nn.Identity(), *new, 4, scaling=0.3, s_aux=sinks)
            outputs.append(out)
        return outputs

    expected = encode("ref")
    flash = FlashStandIns(monkeypatch)
    flash.install(library)
    monkeypatch.setattr(torch, "cat", None)
    served = encode(None)
    flash.remove()
    assert flash.calls == [library, library]
    for a, b in zip(served, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-2)


def test_a_layer_that_never_attends_is_refused_at_the_end_of_the_pass() -> None:
    keys = torch.zeros(1, 2, 3, 8)
    cache = ForestCache(num_trees=1, num_rows=1, prefix_capacity=4, branch_capacity=1)
    with (
        pytest.raises(UnsupportedModel, match="attention code of its own"),
        attention.running(cache, PrefillPass(0, 0), None),
    ):
        cache.update(keys, keys, 0)
    assert cache.current_pass is None
    assert cache.current_layer is None


def test_both_interfaces_know_the_forest_once_a_view_attends() -> None:
    """Without the second, transformers would hand over no mask at all, and say nothing."""
    model = zoo.language_model("llama", num_hidden_layers=1)
    view = attention.attending(model)
    assert view.config._attn_implementation == attention.NAME
    assert model.config._attn_implementation == "eager"
    assert AttentionInterface()[attention.NAME] is forest_attention
    assert AttentionMaskInterface()[attention.NAME] is attention._forest_mask
