"""What every sequence classifier shares as a reward: how a text becomes its token ids."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..chats import chat_token_ids
from ..errors import InvalidArgument
from ..forest.language import max_positions
from ..prompts import Prompt
from .base import Texts


class ClassifierReward:
    """What both kinds of sequence classifier share: how a text becomes token ids.

    Args:
        model: a sequence classifier.
        tokenizer: its own tokenizer; None where it reads the baseline's token ids.
        texts: decodes with the baseline's tokenizer.
        label: which label is the reward; None where there is one label.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Texts,
        label: int | None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.texts = texts
        self.label = check_label(model, label)
        self._shares_ids = tokenizer is None or _encode_alike(tokenizer, texts.tokenizer)

    def shares_ids(self, prompt: Prompt) -> bool:
        """Whether the baseline's token ids of `prompt` and response are the reward's own."""
        if not self._shares_ids or self.tokenizer is None or self.texts.tokenizer is None:
            return self._shares_ids
        is_chat = not isinstance(prompt.given, str)
        same_template = self.tokenizer.chat_template == self.texts.tokenizer.chat_template
        return not is_chat or same_template

    def encode(self, prompt: Prompt, token_ids: Sequence[int]) -> list[int]:
        """Token ids, under the reward's tokenizer, of prompt and response together."""
        if self.shares_ids(prompt):
            return [*prompt.token_ids, *token_ids]
        if not isinstance(prompt.given, str) and self.tokenizer.chat_template:
            answer = self.texts.response(token_ids)
            if prompt.is_continued:
                answer = self.texts.continuation(prompt, token_ids)
            chat = prompt.finished_with(answer)
            return chat_token_ids(self.tokenizer, chat, options=prompt.template_options)
        return self.tokenizer(self.texts.whole(prompt, token_ids))["input_ids"]

    def kv_bytes_per_token(self) -> int:
        """Bytes of KV that a token takes: none here, since whole texts are scored."""
        return 0

    def check_length(self, num_tokens: int) -> None:
        """Refuse a sequence that is longer than the model allows."""
        limit = max_positions(self.model)
        if limit is not None and num_tokens > limit:
            raise InvalidArgument(
                f"prompt and response make {num_tokens} tokens for the reward model, which allows "
                f"{limit}"
            )


def check_label(model: PreTrainedModel, label: int | None) -> int:
    """Return the label that is the reward.

    Raises:
        InvalidArgument: several labels and no index, or an index out of range.
    """
    num_labels = model.config.num_labels
    if label is None and num_labels > 1:
        raise InvalidArgument(
            f"the reward model has {num_labels} labels; reward_index must say which one is the "
            "reward, got None"
        )
    if label is not None and not 0 <= label < num_labels:
        raise InvalidArgument(
            f"reward_index must be in [0, {num_labels}) for this reward model, got {label!r}"
        )
    return label or 0


def _encode_alike(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None
) -> bool:
    """Whether both tokenizers give the same ids for every text."""
    if other is None:
        return False
    probe = "One text, and 2 more."
    return (
        tokenizer.get_vocab() == other.get_vocab()
        and tokenizer(probe)["input_ids"] == other(probe)["input_ids"]
    )
