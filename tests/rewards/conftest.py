"""Tiny tokenizers, trained here from a few sentences, that cut the same text differently."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The old lighthouse keeper wrote letters to the sea every evening.",
    "A good answer is short, honest and kind; a bad one is long.",
    "She asked: what is the fastest way to the station? He did not know.",
    "Numbers like 1024 and 65536 are powers of two, 1000 is not.",
    "Naïve café façade: accents and emoji 🙂 are several bytes each.",
    "In the beginning there was a loop, and the loop was slow.",
]
SPECIAL = ["<pad>", "<s>", "</s>"]

_CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_OTHER_CHAT = (
    "{% for m in messages %}[{{ m['role'] | upper }}] {{ m['content'] }} [END]{% endfor %}"
    "{% if add_generation_prompt %}[ASSISTANT]{% endif %}"
)


def byte_level(num_tokens: int, *, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """BPE over bytes, as GPT-2's: every text comes back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return _wrapped(tokenizer, chat_template)


def metaspace(
    num_tokens: int, *, with_ends: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """BPE over words that start with a mark for the space, as Llama's.

    Decoding drops a space at the start of the text. `with_ends`: <s> and </s> around every text.
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=num_tokens - 256, show_progress=False)
    learner.train_from_iterator(SENTENCES, trainer)
    learnt = json.loads(learner.to_str())["model"]
    # Bytes are ordinary tokens: characters that no sentence had are made of them.
    words = sorted(learnt["vocab"], key=learnt["vocab"].get)
    ordered = [*SPECIAL, *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    merges = [tuple(pair) for pair in learnt["merges"]]
    vocab = {token: idx for idx, token in enumerate(ordered)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    if with_ends:
        ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>",
            special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])],
        )
    return _wrapped(tokenizer, chat_template)


def _wrapped(tokenizer: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """By name; those that end in -chat have a chat template, and not the same one."""
    return {
        "bytes": byte_level(320),
        "bytes-large": byte_level(420),
        "bytes-chat": byte_level(320, chat_template=_CHAT),
        "bytes-other-chat": byte_level(320, chat_template=_OTHER_CHAT),
        "words": metaspace(380),
        "words-ends": metaspace(420, with_ends=True),
        "words-chat": metaspace(400, chat_template=_OTHER_CHAT),
    }
