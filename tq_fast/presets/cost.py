"""The token-forwards that a method takes for a prompt, counted before it begins.

A token-forward is one token that goes through one model, as `DecodeStats.token_forwards` counts
them. With P tokens of the prompt, T new tokens, k candidates, n roll-outs of L tokens each:

    token by token   roller   P + T (k + k n (L - 1))     a candidate's n roll-outs share its token
                     prior    P + T                       and T k n L where it scores roll-outs
                     reward   R + T k n (1 + L + c)       R, c: its prompt, and what closes a turn
    whole texts      law      P + sum of the tokens drawn, without the last of each text
                     reward   R + sum of the tokens drawn
                     others   P + T                       the models that measure the divergence

A reward that keeps no prefix (an encoder, a server) reads every text whole. These are bounds:
responses that end early, roll-outs that bounds on the reward make needless, equal texts and common
prefixes take less. GPUs take a little more where a graph's rows are padded to its size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel

from ..config import DecodeConfig, Role
from ..decoder import TransferMethod
from ..forest import common_length
from ..models.served import ServedModel
from ..prompts import Prompt
from ..rewards.base import Reward
from ..rewards.causal import CausalReward
from ..rewards.classifier import ClassifierReward
from ..session import Session
from ..session.method import Method
from ..transfer.roles import DecodePlan, distinct
from .collab import CollabMethod
from .rounds import Round
from .served import Law, ServedLaw


class TextMethod(Method, Protocol):
    """A method that draws whole texts, or blocks of them."""

    session: Session
    law: Law
    rounds: Sequence[Round]


class MethodCost:
    """The token-forwards of a method, at most.

    Args:
        method: one of a session's.

    Attributes:
        is_bound: whether what was counted so far is a bound. It is none where a reward has another
            tokenizer: how many tokens of its own a response will be is not known.
    """

    def __init__(self, method: Any) -> None:
        self.is_bound = True
        self._counter: _Steps | _Texts
        if isinstance(method, CollabMethod):
            plan = method.transfer.plan
            self._counter = _Steps(method.session, plan, method.agents)
        elif isinstance(method, TransferMethod):
            self._counter = _Steps(method.session, method.plan, [method.plan.roller])
        else:
            self._counter = _Texts(method)

    def of_prompt(self, prompt: Prompt) -> Counter[str]:
        """Return the token-forwards of one response to `prompt`, by role."""
        counts = Counter(self._counter.languages(len(prompt.token_ids)))
        for role, reward in self._counter.rewards.items():
            if isinstance(reward, ClassifierReward):
                read = _Reading(reward, prompt)
                self.is_bound &= read.counts_response
                counts[role] += self._counter.reward(reward, read)
        return counts


def draws_texts(method: Method) -> bool:
    """Whether a method draws whole texts or blocks, which are scored once they are drawn."""
    return not isinstance(method, (TransferMethod, CollabMethod))


class _Reading:
    """How many tokens a classifier reads of a prompt.

    Attributes:
        num_prompt: tokens of the prompt with an empty response.
        num_closing: tokens behind the response, which close its turn.
        counts_response: whether the tokens of a response are those of the language models.
    """

    def __init__(self, reward: ClassifierReward, prompt: Prompt) -> None:
        form = reward.form(prompt)
        empty = form.row([]).token_ids
        one = form.row(prompt.token_ids[-1:]).token_ids
        self.num_prompt = len(empty)
        self.num_closing = max(0, len(empty) - common_length([empty, one]))
        self.counts_response = form.counts_response


class _Steps:
    """Token by token, among candidates that are rolled out.

    Args:
        session: the models.
        plan: the settings.
        rollers: the roles whose models roll out.
    """

    def __init__(self, session: Session, plan: DecodePlan, rollers: Sequence[Role]) -> None:
        self.config: DecodeConfig = plan.config
        self.session = session
        self.rollers = [session.languages[role] for role in rollers]
        self.num_rows = self.config.k * self.config.rollouts_per_candidate
        self.num_steps = self.config.max_new_tokens
        self.horizons = [self.config.horizon_at(step) for step in range(self.num_steps)]
        self.merges = plan.speed.merge_equal and self.config.rollout == "sample"
        rewards = {"reward": session.rewards["reward"]}
        if self.config.needs_baseline_reward:
            rewards["baseline_reward"] = session.rewards["baseline_reward"]
        self.rewards = distinct(rewards)

    def languages(self, num_prompt: int) -> dict[str, int]:
        drawn = self.num_rows * sum(self.horizons)
        counts = {}
        for role, model in distinct(self.session.languages).items():
            counts[str(role)] = num_prompt + self.num_steps
            if model in self.rollers:
                counts[str(role)] += drawn if isinstance(model, ServedModel) else self._rolled_out()
            if self.config.needs_log_ratio and model is self.session.languages["sft"]:
                counts[str(role)] += drawn
        return counts

    def _rolled_out(self) -> int:
        """Tokens through the model that rolls out: every one but the last of a roll-out."""
        num_first = self.config.k if self.merges else self.num_rows
        return sum(num_first + self.num_rows * (left - 1) for left in self.horizons if left)

    def reward(self, reward: Reward, read: _Reading) -> int:
        count = read.num_prompt if isinstance(reward, CausalReward) else 0
        for step, left in enumerate(self.horizons):
            # Without roll-outs a candidate is one text.
            num_texts = len(self.rollers) * (self.num_rows if left else self.config.k)
            new = 1 + left + read.num_closing
            if not isinstance(reward, CausalReward):
                new = read.num_prompt + step + 1 + left
            count += num_texts * new
        return count


class _Texts:
    """Whole texts, or blocks, round by round."""

    def __init__(self, method: TextMethod) -> None:
        self.session, self.law = method.session, method.law
        self.rounds = method.rounds
        self.num_drawn = sum(part.num_tokens for part in method.rounds)
        self.num_new = method.config.max_new_tokens
        known = self.session.rewards.get("reward")
        self.rewards: dict[str, Reward] = {} if known is None else {"reward": known}

    def languages(self, num_prompt: int) -> dict[str, int]:
        if isinstance(self.law, ServedLaw):
            counts = {str(self.law.role): self.num_drawn}
        else:
            # The last token of a draw is not encoded, but every later round encodes the token
            # before its cut.
            num_draws = sum(part.num for part in self.rounds)
            drawing = num_prompt + self.num_drawn - num_draws + len(self.rounds) - 1
            read = {role: self.session.languages[role] for role in self.law.roles}
            counts = {str(role): drawing for role in distinct(read)}
            if self.law.reads_reward:
                counts["reward_states"] = drawing
        for role, model in self.session.languages.items():
            if role not in self.law.roles and isinstance(model, PreTrainedModel):
                counts[str(role)] = counts.get(str(role), 0) + num_prompt + self.num_new
        return counts

    def reward(self, reward: Reward, read: _Reading) -> int:
        if isinstance(reward, CausalReward):
            closing = read.num_closing * sum(part.num for part in self.rounds)
            return read.num_prompt + self.num_drawn + closing
        return sum(part.num * (read.num_prompt + part.before + part.length) for part in self.rounds)
