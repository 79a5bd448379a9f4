"""The base of classifiers as rewards: how a text becomes its token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidArgument, warn_caller
from ..prompts import Prompt
from .base import Reward, Texts, drop_from
from .chats import ChatReader
from .forms import ChatForm, Form, PairForm, Row, TextForm, TokenForm, question_text
from .lengths import check_room, positions_of
from .options import RewardOptions

_WAY_OUT = "; reward_options=RewardOptions(truncate='left') cuts what is too long"


class ClassifierReward(Reward):
    """The base of both kinds of sequence classifier: how a text becomes token ids.

    Args:
        model: a sequence classifier.
        tokenizer: its own tokenizer; None where it reads the baseline's token ids.
        texts: decodes with the baseline's tokenizer.
        label: which label is the reward; None where there is one label.
        options: how prompts and responses are read.
        num_labels: scores that the model gives a text; None: as many as its configuration says.
    """

    model: Any

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: Texts,
        label: int | None,
        *,
        options: RewardOptions | None = None,
        num_labels: int | None = None,
    ) -> None:
        self.source = self.model = model
        self.tokenizer = tokenizer
        self.texts = texts
        self.options = options or RewardOptions()
        self.label = label
        self.column = check_label(num_labels or self.model.config.num_labels, label)
        self.limit = positions_of(model)
        self._own = texts.tokenizer if tokenizer is None else tokenizer
        self._shares_ids = tokenizer is None or encode_alike(tokenizer, texts.tokenizer)
        self._template = self._own
        if self._own is not None and not self._own.chat_template and self._shares_ids:
            self._template = texts.tokenizer
        self._chats = ChatReader(texts.tokenizer, self._own)
        self._warned: set[int] = set()

    def form(self, prompt: Prompt) -> Form:
        """Return how the reward reads `prompt`, whatever form it came in."""
        messages = self._chats.messages(prompt)
        if self.options.pair:
            assert self._own is not None, "pairs are made by a tokenizer"
            return PairForm(
                prompt, question_text(prompt, messages, self.texts), self.texts, self._own
            )
        if messages is not None and self._template is not None and self._template.chat_template:
            return ChatForm(prompt, messages, self.texts, self._template)
        if self._shares_ids and not _appends(self._own):
            return TokenForm(prompt, self._own)
        assert self._own is not None, "another tokenizer than the baseline's is there"
        before = self.texts.before(prompt)
        if messages is not None:
            before = self.texts.response(prompt.token_ids)
        return TextForm(prompt, before, self.texts, self._own)

    def encode(self, prompt: Prompt, token_ids: Sequence[int]) -> list[int]:
        """Token ids, under the reward's tokenizer, of prompt and response together."""
        return self.read(self.form(prompt), token_ids).token_ids

    def read(self, form: Form, token_ids: Sequence[int]) -> Row:
        """Return what the model reads of a response, cut to its positions where that is asked for.

        Raises:
            InvalidArgument: it is longer than the model allows.
        """
        row = form.row(token_ids)
        num_tokens = len(row.token_ids)
        if self.limit is None or num_tokens <= self.limit:
            return row
        if self.options.truncate is None:
            raise InvalidArgument(
                f"prompt and response make {num_tokens} tokens for the reward model, which allows "
                f"{self.limit}{_WAY_OUT}"
            )
        return self._cut(row, self.limit)

    def check_prompt(
        self, idx: int, prompt: Prompt, num_new: int, settings: str, *, role: str
    ) -> None:
        """Refuse a prompt that is too long or that the chat template refuses.

        Of a reward with another tokenizer only the prompt is counted: how many tokens of its own a
        response will be is not known.
        """
        self._warn_of_markers(idx, prompt, role)
        try:
            form = self.form(prompt)
            num_tokens = len(form.row([]).token_ids)
        except Exception as error:
            raise InvalidArgument(
                f"prompts[{idx}] cannot be rendered for the {role}, by the chat template of its "
                f"tokenizer: {error}"
            ) from error
        if self.limit is None or self.options.truncate is not None:
            return
        hint = _WAY_OUT if role == "reward" else ""
        if form.counts_response or (isinstance(form, ChatForm) and self._shares_ids):
            check_room(idx, num_tokens, num_new, settings, role=role, limit=self.limit, hint=hint)
        elif num_tokens >= self.limit:
            raise InvalidArgument(
                f"prompts[{idx}] has {num_tokens} tokens for the {role} model, which allows "
                f"{self.limit}: no room for a response{hint}"
            )

    def _warn_of_markers(self, idx: int, prompt: Prompt, role: str) -> None:
        if prompt.key in self._warned or self.options.pair:
            return
        markers = self._chats.markers(prompt)
        if markers:
            self._warned.add(prompt.key)
            warn_caller(
                f"prompts[{idx}] holds markers of a chat template ({' '.join(markers)}) but is no "
                f"chat that the template renders up to an answer: the {role} reads it as text; "
                "pass messages"
            )

    def _cut(self, row: Row, limit: int) -> Row:
        """`row` without what is too long; special tokens at its ends stay."""
        num_over = len(row.token_ids) - limit
        special = set() if self._own is None else set(self._own.all_special_ids)
        first = 0
        while first < limit and row.token_ids[first] in special:
            first += 1
        last = len(row.token_ids)
        while last > first and row.token_ids[last - 1] in special:
            last -= 1
        candidates = list(range(first, last))
        if row.parts is not None:
            candidates = [i for i in candidates if row.parts[i] is not None]
            # The prompt goes first, and then the response's end.
            prompt = [i for i in candidates if row.parts[i] == 0]
            response = [i for i in candidates if row.parts[i] == 1]
            candidates = [*self._in_order(prompt), *reversed(response)]
        else:
            candidates = self._in_order(candidates)
        dropped = set(candidates[:num_over])
        kept = [i for i in range(len(row.token_ids)) if i not in dropped][:limit]
        types = None if row.type_ids is None else [row.type_ids[i] for i in kept]
        return Row([row.token_ids[i] for i in kept], None, types)

    def _in_order(self, indices: list[int]) -> list[int]:
        """Indices in the order that they are cut in."""
        return indices if self.options.truncate == "left" else indices[::-1]


class WholeTexts:
    """What a reward that reads whole texts keeps of the prompts of a forest: their form.

    Args:
        reward: the classifier.
        prompts: one a tree.
    """

    peak_kv_bytes = 0

    def __init__(self, reward: ClassifierReward, prompts: Sequence[Prompt]) -> None:
        self._reward = reward
        self._forms = [reward.form(prompt) for prompt in prompts]
        self.num_token_forwards = 0

    def rows(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[Row]:
        """Return what the model reads of `responses[i]` to the prompt of `trees[i]`."""
        return [
            self._reward.read(self._forms[tree], response)
            for tree, response in zip(trees, responses, strict=True)
        ]

    def keep(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> None:
        """Keep nothing: every text is read whole again."""

    def replace_tree(self, tree: int, prompt: Prompt) -> None:
        self._forms[tree] = self._reward.form(prompt)

    def drop_tree(self, tree: int) -> None:
        drop_from(self._forms, tree)


def without_padding(token_ids: list[int], pad: int | None) -> list[int]:
    """Leave out padding at the end, before which transformers reads a score; one token stays."""
    end = len(token_ids)
    while end > 1 and token_ids[end - 1] == pad:
        end -= 1
    return token_ids[:end]


def check_label(num_labels: int, label: int | None) -> int:
    """Return the label that is the reward.

    Raises:
        InvalidArgument: several labels and no index, or an index out of range.
    """
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


def encode_alike(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None) -> bool:
    """Whether both tokenizers give the same ids for every text, as far as trying shows."""
    if other is None:
        return False
    if tokenizer is other:
        return True
    if tokenizer.get_vocab() != other.get_vocab():
        return False
    special = " a ".join(map(str, other.all_special_tokens))
    probes = ["One text, and 2 more.", "  led by spaces\n\n\tand lines ", special]
    probes.append("Naïve café façade, 日本語, Здравствуй: 🙂 \u200d e\u0301")
    probes += _rendered_probe(tokenizer, other)
    return all(
        tokenizer(text, add_special_tokens=adds)["input_ids"]
        == other(text, add_special_tokens=adds)["input_ids"]
        for text in probes
        for adds in (True, False)
    )


def _rendered_probe(*tokenizers: PreTrainedTokenizerBase) -> list[str]:
    """A short chat under the template of each tokenizer that has one."""
    chat = [{"role": "user", "content": "Well?"}]
    found = []
    for tokenizer in tokenizers:
        if tokenizer.chat_template:
            try:
                found.append(str(tokenizer.apply_chat_template(chat, tokenize=False)))
            except Exception:
                # A template of any author may want other messages.
                continue
    return found


def _appends(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the tokenizer ends every text with a token: a response cannot follow those ids."""
    if tokenizer is None:
        return False
    bare, whole = (tokenizer("a", add_special_tokens=adds)["input_ids"] for adds in (False, True))
    return bool(bare) and whole[-len(bare) :] != bare
