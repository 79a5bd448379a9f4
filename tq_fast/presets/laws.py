"""The laws that whole responses are drawn from, one token of all rows at a time.

A law reads what the forests of its models give after each row and draws the next tokens into a
`RolloutState`. What it records of every token stands in the state's columns: "policy", the log-prob
before temperature and truncation; "drawn", the log density drawn from; of every model
"logprob:ROLE" and "kl:ROLE", the divergence of the law drawn from; of a value head "q" and "value".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from .. import ops
from ..config import DecodeConfig, Role
from ..engines.local import without_tokens
from ..ops.sample_tokens import SampledTokens, proposal_logprobs
from ..ops.topk_logprobs import clean_logits
from ..rollouts.state import RolloutState
from ..transfer.certificate import kl_divergence
from ..values.head import ValueHead


class Output(NamedTuple):
    """What a model gives after n rows: logits `[n, V]`, and the states `[n, D]` behind them."""

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Draw(NamedTuple):
    """One draw of every row, all `[n]`: ids, whether they are valid, what is recorded (fp32)."""

    ids: torch.Tensor
    valid: torch.Tensor
    recorded: dict[str, torch.Tensor]


class TokenLaw(Protocol):
    """A law of the next token."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The models that it reads."""
        ...

    @property
    def reads_hidden(self) -> Role | None:
        """The role whose states it reads beside the logits, or None."""
        ...

    @property
    def reads_reward(self) -> bool:
        """Whether it reads the reward model's states too, behind those of `reads_hidden`."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what it records."""
        ...

    @property
    def prior(self) -> str:
        """What a certificate calls the law that is reweighted or drawn from."""
        ...

    def draw(
        self,
        outputs: Mapping[Role, Output],
        keys: torch.Tensor,
        depth: int | torch.Tensor,
        early: Sequence[bool] | None,
    ) -> Draw:
        """Draw a token for every row; those that are `early` draw no EOS."""
        ...


@dataclasses.dataclass(frozen=True)
class MixtureLaw:
    """`softmax(sum_m c_m log pi_m)` over the whole vocabulary, after temperature and truncation.

    Attributes:
        weights: c_m by role, summing to 1; a model of weight 0 is only measured against.
        eos: ids that end a response.
        vocab_size: ids from here on are never drawn.
        config: temperature, truncation, seed and backend.
        is_greedy: take the arg max.
    """

    weights: Mapping[Role, float]
    eos: tuple[int, ...]
    vocab_size: int
    config: DecodeConfig
    is_greedy: bool

    reads_hidden: Role | None = None
    reads_reward: bool = False

    @property
    def roles(self) -> tuple[Role, ...]:
        return tuple(self.weights)

    @property
    def columns(self) -> tuple[str, ...]:
        of_models = [f"{kind}:{role}" for role in self.weights for kind in ("logprob", "kl")]
        return ("policy", "drawn", *of_models)

    @property
    def prior(self) -> str:
        taking_part = [role for role, weight in self.weights.items() if weight != 0.0]
        return taking_part[0] if len(taking_part) == 1 else "mixture"

    def draw(
        self,
        outputs: Mapping[Role, Output],
        keys: torch.Tensor,
        depth: int | torch.Tensor,
        early: Sequence[bool] | None,
    ) -> Draw:
        logits = {role: output.logits for role, output in outputs.items()}
        policy = mix_policies(logits, self.weights, self.vocab_size)
        if early is not None:
            policy = without_tokens(policy, self.eos, early)
        config = self.config
        drawn = ops.sample_tokens(
            policy,
            keys,
            depth,
            temperature=0.0 if self.is_greedy else config.rollout_temperature,
            top_k=config.rollout_top_k,
            top_p=config.rollout_top_p,
            seed=config.seed,
            backend=config.backend,
        )
        recorded = {"policy": drawn.logprobs, "drawn": drawn.proposal_logprobs}
        recorded |= self._compare(policy, drawn, logits, is_changed=early is not None)
        return Draw(drawn.ids, drawn.valid, recorded)

    def _compare(
        self,
        policy: torch.Tensor,
        drawn: SampledTokens,
        logits: Mapping[Role, torch.Tensor],
        *,
        is_changed: bool,
    ) -> dict[str, torch.Tensor]:
        """Log-prob of the drawn tokens under every model, and KL `[n]` of the law drawn from."""
        config = self.config
        top_k, top_p = config.rollout_top_k, config.rollout_top_p
        is_plain = (config.rollout_temperature, top_k, top_p) == (1.0, 0, 1.0)
        is_plain = is_plain and not self.is_greedy and not is_changed
        # A model that is itself the law drawn from has no divergence, and its log-prob is known.
        others = [role for role in logits if not (is_plain and self.weights[role] == 1.0)]
        recorded = {f"logprob:{role}": drawn.logprobs for role in logits}
        if others and not self.is_greedy:
            law = proposal_logprobs(
                policy, temperature=config.rollout_temperature, top_k=top_k, top_p=top_p
            )
        for role in others:
            logprobs = clean_logits(logits[role], self.vocab_size).log_softmax(-1)
            picked = logprobs.gather(1, drawn.ids[:, None]).squeeze(1)
            recorded[f"logprob:{role}"] = picked
            recorded[f"kl:{role}"] = -picked if self.is_greedy else kl_divergence(law, logprobs)
        return recorded


@dataclasses.dataclass(frozen=True)
class ValueLaw:
    """`pi_prior(z|x) exp(Q_V(x, z) / alpha) / Z(x)` over the whole vocabulary.

    Its divergence from the prior is exact, and comes from the pass that draws.

    Attributes:
        head: Q_V, which reads the prior's states.
        prior: the role whose policy is reweighted.
        eos: ids that end a response.
        vocab_size: ids from here on are never drawn.
        config: alpha, temperature, truncation, seed and backend.
        is_greedy: take the arg max.
        measured: roles whose divergence is measured beside the prior's.
    """

    head: ValueHead
    prior: Role
    eos: tuple[int, ...]
    vocab_size: int
    config: DecodeConfig
    is_greedy: bool
    measured: tuple[Role, ...] = ()

    @property
    def roles(self) -> tuple[Role, ...]:
        return (self.prior, *self.measured)

    @property
    def reads_hidden(self) -> Role:
        return self.prior

    @property
    def reads_reward(self) -> bool:
        return self.head.config.reward_states

    @property
    def columns(self) -> tuple[str, ...]:
        of_models = [f"{kind}:{role}" for role in self.roles for kind in ("logprob", "kl")]
        return ("policy", "drawn", "q", "value", *of_models)

    def draw(
        self,
        outputs: Mapping[Role, Output],
        keys: torch.Tensor,
        depth: int | torch.Tensor,
        early: Sequence[bool] | None,
    ) -> Draw:
        config, (logits, hidden) = self.config, outputs[self.prior]
        assert hidden is not None, "the prior's forest keeps its states"
        values, directions = self.head(hidden)
        allowed = logits if early is None else without_tokens(logits, self.eos, early)
        drawn = ops.value_sample_tokens(
            allowed,
            directions,
            self.head.token_embeddings,
            keys,
            depth,
            alpha=config.alpha,
            temperature=config.rollout_temperature,
            top_k=config.rollout_top_k,
            top_p=config.rollout_top_p,
            greedy=self.is_greedy,
            seed=config.seed,
            vocab_size=self.vocab_size,
            backend=config.backend,
        )
        prior_logprobs, kl = drawn.prior_logprobs, drawn.kl
        if early is not None:
            # The pass knows the prior without its EOS only; the prior itself has it.
            sums = [clean_logits(x, self.vocab_size).logsumexp(-1) for x in (allowed, logits)]
            prior_logprobs, kl = prior_logprobs + sums[0] - sums[1], kl - sums[0] + sums[1]
        advantages = (directions * self.head.token_embeddings[drawn.ids].float()).sum(1)
        recorded = {
            "policy": drawn.prior_logprobs,
            "drawn": drawn.guided_logprobs,
            "value": values,
            "q": values + advantages,
            f"logprob:{self.prior}": prior_logprobs,
            f"kl:{self.prior}": kl,
        }
        for role in self.measured:
            recorded |= self._measure(role, outputs[role].logits, allowed, directions, drawn.ids)
        return Draw(drawn.ids, drawn.valid, recorded)

    def _measure(
        self,
        role: Role,
        logits: torch.Tensor,
        allowed: torch.Tensor,
        directions: torch.Tensor,
        ids: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Log-prob of `ids` under another model, and KL `[n]` of the law drawn from to it."""
        config = self.config
        logprobs = clean_logits(logits, self.vocab_size).log_softmax(-1)
        picked = logprobs.gather(1, ids[:, None]).squeeze(1)
        if self.is_greedy:
            return {f"logprob:{role}": picked, f"kl:{role}": -picked}
        q = directions @ self.head.token_embeddings[: self.vocab_size].float().t()
        guided = clean_logits(allowed, self.vocab_size) + q / config.alpha
        law = proposal_logprobs(
            guided,
            temperature=config.rollout_temperature,
            top_k=config.rollout_top_k,
            top_p=config.rollout_top_p,
        )
        return {f"logprob:{role}": picked, f"kl:{role}": kl_divergence(law, logprobs)}


def mix_policies(
    logits: Mapping[Role, torch.Tensor], weights: Mapping[Role, float], vocab_size: int
) -> torch.Tensor:
    """Return `sum_m c_m log_softmax(logits_m)` `[N, V]`, fp32; unnormalised, natural log.

    A token that a model of weight other than 0 never gives has -inf, whatever the weights.
    """
    taking_part = {role: weight for role, weight in weights.items() if weight != 0.0}
    if len(taking_part) == 1:
        return logits[next(iter(taking_part))][:, :vocab_size]
    logprobs = {
        role: clean_logits(logits[role], vocab_size).log_softmax(-1) for role in taking_part
    }
    first, *others = (weight * logprobs[role] for role, weight in taking_part.items())
    mixed = sum(others, start=first)
    for law in logprobs.values():
        mixed = mixed.masked_fill(law == -torch.inf, -torch.inf)
    return mixed


def record_draw(
    draw: Draw, state: RolloutState, depth: int | torch.Tensor, *, eos: torch.Tensor
) -> None:
    """Append the drawn tokens at `depth` to the first responses of `state`.

    Logits that are no law end their response; its "policy" is -inf there, as of no other token.

    Args:
        draw: of the first responses.
        state: changed in place.
        depth: tokens that every response holds already; a tensor (int64 `[1]`) where only the
            device knows it.
        eos: int64 `[E]`, ids that end a response.
    """
    num = len(draw.ids)
    finished = state.finished[:num]
    state.lengths[:num] += ~finished
    finished |= torch.isin(draw.ids, eos) | ~draw.valid
    finished |= state.lengths[:num] >= state.limits[:num]
    written = [(state.columns[name], values) for name, values in draw.recorded.items()]
    for column, values in [(state.tokens, draw.ids), *written]:
        if isinstance(depth, int):
            column[:num, depth] = values
        else:
            column[:num].index_copy_(1, depth, values[:, None])
