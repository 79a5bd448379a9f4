"""Fields of a generation_config that are set and not read are named, once a model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from transformers import GenerationConfig

import tq_fast
from tests import zoo
from tq_fast.models.generation import ignored_settings, warn_of_ignored


def model(**settings: Any) -> Any:
    made = zoo.language_model("llama")
    made.generation_config = GenerationConfig()
    for name, value in settings.items():
        setattr(made.generation_config, name, value)
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "do_sample": True},
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1},
        {"eos_token_id": 2, "pad_token_id": 1, "max_new_tokens": 7, "use_cache": False},
    ],
)
def test_settings_that_change_no_token_are_not_said(settings: dict[str, Any]) -> None:
    assert ignored_settings(model(**settings)) == {}


def test_a_decode_names_them_once_a_model() -> None:
    baseline = model(temperature=0.6, bad_words_ids=[[3]])
    sft = model(repetition_penalty=1.1)
    options = {"k": 2, "horizon": 0, "max_new_tokens": 1}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tq_fast.decode([[5], [6]], baseline, lambda p, r: [0.0] * len(r), sft=sft, **options)
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 2
    assert texts[0].startswith("baseline: the model's generation_config sets bad_words_ids=[[3]],")
    assert "temperature=0.6" in texts[0] and "repetition_penalty=1.1" in texts[1]


def test_a_model_in_two_roles_is_named_once() -> None:
    same = model(min_p=0.1)
    with pytest.warns(UserWarning, match="min_p=0.1") as said:
        warn_of_ignored({"baseline": same, "sft": same})
    assert len(said) == 1
