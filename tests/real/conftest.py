"""The real model, written once as a folder of transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scripts.make_real_model import make_real_model

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits that are red.",
    "How do I boil an egg?",
    "Write one sentence about the sea.",
    "Why is the sky blue?",
    "Give me a short recipe for pancakes, with the quantities of every ingredient.",
    "Translate 'good morning' into Spanish.",
    "What is 12 times 3?",
    "Who wrote Hamlet?",
    "List two uses of copper and say why it is used for them.",
)


@pytest.fixture(scope="session")
def folder() -> Path:
    """Where the model lies: TEST_REAL_MODEL, else build/real."""
    default = Path(__file__).parents[2] / "build" / "real" / "smollm2"
    path = Path(os.environ.get("TEST_REAL_MODEL", default))
    make_real_model(path)
    return path


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def reward(model: PreTrainedModel) -> PreTrainedModel:
    """A classifier over the same backbone, with a head that was drawn once."""
    config = type(model.config).from_dict({**model.config.to_dict(), "num_labels": 1})
    config.pad_token_id = 0
    with torch.device("meta"):
        classifier = LlamaForSequenceClassification(config)
    classifier.model = model.model
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, config.hidden_size, generator=generator) / config.hidden_size**0.5
    classifier.score.weight = torch.nn.Parameter(weight)
    return classifier.eval()


def chats(num: int) -> list[list[dict[str, str]]]:
    """The first questions, each as a chat of one turn."""
    return [[{"role": "user", "content": question}] for question in QUESTIONS[:num]]
