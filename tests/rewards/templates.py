"""Chat templates of common shapes, and a byte-level tokenizer whose role markers are special."""

from __future__ import annotations

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tests.rewards.conftest import byte_level

_OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)
TEMPLATES = {
    "chatml": "{{ bos_token }}" + _TURNS + _OPENS,
    "no-start": _TURNS + _OPENS,
    "trims": _TURNS.replace("m['content']", "m['content'] | trim") + _OPENS,
    "default-system": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
        "{% endif %}" + _TURNS + _OPENS
    ),
    "strict": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must take turns') }}{% endif %}{% endfor %}" + _TURNS + _OPENS
    ),
    "words": (
        "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    ),
}


def marked(
    template: str | None,
    *,
    adds_start: bool = False,
    adds_end: bool = False,
    num_tokens: int = 320,
    special: tuple[str, ...] = (),
) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of ChatML and `special`.

    `adds_start`, `adds_end`: it writes <s> before, </s> after every text.
    """
    tokenizer = byte_level(num_tokens, chat_template=template)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *special]}
    )
    if adds_start or adds_end:
        single = "<s> " * adds_start + "$A" + " </s>" * adds_end
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
        )
    return tokenizer
