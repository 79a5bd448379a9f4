"""Whole texts drawn and chosen by plain loops, which refinement and blocks must equal.

Every draw is a full forward pass over prompt and text of the model as transformers made it; nothing
is kept between draws. The package gives the keys of the random streams and the reference of the
sampler alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from tests.naive import SequenceReward
from tq_fast.ops.sample_tokens import sample_tokens_ref
from tq_fast.prompts import Prompt
from tq_fast.rollouts.streams import stream_keys
from tq_fast.values.head import ValueHead

# In the place of the candidate in the key of a stream: nothing follows from a candidate here.
NO_CANDIDATE = 0xFFFFFFFF

# Takes rows of one length `[n, T]` and returns the logits `[n, V]` that the next token has.
NextLogits = Callable[[torch.Tensor], torch.Tensor]
# Takes a stage and a text and returns where it is cut, or None.
CutAt = Callable[[int, list[int]], int | None]


def logits_of(model: PreTrainedModel) -> NextLogits:
    """The logits of `model` itself."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits[:, -1]


def guided_logits_of(model: PreTrainedModel, head: ValueHead, alpha: float) -> NextLogits:
    """The logits of `model` plus Q_V / alpha, in fp64."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, -1]
        values, directions = head(hidden)
        found = model.lm_head(hidden).double()
        q = values[:, None] + directions @ head.token_embeddings[: found.shape[-1]].t()
        return found + q.double() / alpha

    return logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaiveTexts:
    """How texts are drawn and scored.

    Attributes:
        next_logits: the law of a token.
        reward: of whole sequences.
        max_new_tokens, eos, seed: those of `tq_fast.DecodeConfig`.
    """

    next_logits: NextLogits
    reward: SequenceReward
    max_new_tokens: int
    eos: tuple[int, ...] = ()
    seed: int = 0

    def is_complete(self, text: Sequence[int]) -> bool:
        return len(text) >= self.max_new_tokens or bool(set(text[-1:]) & set(self.eos))

    def draw(
        self, prompt: Prompt, stage: int, before: list[int], num: int, limit: int | None = None
    ) -> list[list[int]]:
        """Return `num` continuations of `before`."""
        keys = stream_keys([(prompt.key, stage, NO_CANDIDATE, n) for n in range(num)])
        most = self.max_new_tokens - len(before)
        drawn: list[list[int]] = [[] for _ in range(num)]
        for depth in range(most if limit is None else min(limit, most)):
            live = [i for i, new in enumerate(drawn) if not self.is_complete([*before, *new])]
            if not live:
                break
            rows = torch.tensor([[*prompt.token_ids, *before, *drawn[i]] for i in live])
            logits = self.next_logits(rows)
            ids = sample_tokens_ref(logits.float(), keys[live], depth, seed=self.seed).ids
            for i, token in zip(live, ids.tolist(), strict=True):
                drawn[i].append(token)
        return drawn

    def score(self, prompt: Prompt, texts: Sequence[Sequence[int]]) -> list[float]:
        return self.reward([[*prompt.token_ids, *text] for text in texts])


@dataclasses.dataclass
class NaiveStage:
    """One contest: where it began, what was drawn, its scores, and which one won."""

    cut: int
    before: list[int]
    drawn: list[list[int]]
    rewards: list[float]
    choice: int | None


def first_best(scores: Sequence[float]) -> int:
    return list(scores).index(max(scores))


def refine_naively(
    prompt: Prompt, how: NaiveTexts, *, first: int, branches: int, stages: int, cut_at: CutAt
) -> tuple[list[int], list[NaiveStage]]:
    """Return the refined text of `prompt` and its stages."""
    drawn = how.draw(prompt, 0, [], first)
    rewards = how.score(prompt, drawn)
    best = first_best(rewards)
    text, worth = drawn[best], rewards[best]
    record = [NaiveStage(0, [], drawn, rewards, best)]
    for stage in range(1, stages + 1):
        cut = cut_at(stage, text)
        if cut is None:
            continue
        before = text[:cut]
        drawn = how.draw(prompt, stage, before, branches)
        rewards = how.score(prompt, [[*before, *new] for new in drawn])
        best = first_best(rewards)
        choice = best if rewards[best] > worth else None
        record.append(NaiveStage(cut, text, drawn, rewards, choice))
        if choice is not None:
            text, worth = [*before, *drawn[choice]], rewards[choice]
    return text, record


def decode_by_blocks(
    prompt: Prompt, how: NaiveTexts, *, branches: int, block_len: int, completes: bool
) -> tuple[list[int], list[NaiveStage]]:
    """Return the text of `prompt` that is chosen block by block, and its stages."""
    text: list[int] = []
    record: list[NaiveStage] = []
    while not text or not how.is_complete(text):
        limit = None if completes else block_len
        drawn = how.draw(prompt, len(record), text, branches, limit)
        rewards = how.score(prompt, [[*text, *new] for new in drawn])
        best = first_best(rewards)
        record.append(NaiveStage(len(text), text, drawn, rewards, best))
        text = [*text, *drawn[best][:block_len]]
    return text, record
