"""A small model behind a fake server, and the server as a caller names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import tq_fast
from tests import zoo
from tests.servers.fake_server import FakeServer

VOCAB_SIZE = 60


@pytest.fixture(scope="session")
def model() -> PreTrainedModel:
    return zoo.language_model("llama", seed=3, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="session")
def classifier() -> PreTrainedModel:
    return zoo.classifier("llama", seed=4, vocab_size=VOCAB_SIZE)


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeServer]]:
    """Start fake servers that end with the test."""
    started: list[FakeServer] = []

    def start(*args: Any, **settings: Any) -> FakeServer:
        started.append(FakeServer(*args, **settings))
        return started[-1]

    yield start
    for server in started:
        server.close()


def patient(fake: FakeServer, **options: Any) -> tq_fast.Server:
    """The fake server as a caller names it, with waits that a test can wait for."""
    # Each connection is a thread of the fake server, and many threads of one process are slow.
    options = {"backoff": 0.001, "retries": 3, "max_concurrent": 8, **options}
    return tq_fast.Server(fake.url, **options)


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """Where the embedded reward model lies, with its tokenizer."""
    return Path(tq_fast.__file__).parent / "models" / "tiny" / "weights" / "reward"


@pytest.fixture(scope="session")
def tiny_classifier(tiny_folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded reward model and its tokenizer."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_folder).eval()
    return model, AutoTokenizer.from_pretrained(tiny_folder)
