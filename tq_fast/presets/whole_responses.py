"""Whole responses drawn from a model's own law, or from a mixture of two, without any reward.

Every prompt is a tree of the forest and every response a row of it, from its first token to its
last; all rows of all prompts go through one forward pass a token. With policies pi_m and weights
c_m that sum to 1, the next token is drawn from

    softmax(sum_m c_m log pi_m)        over the whole vocabulary

after temperature and truncation. A model of weight 0 is only measured against.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch

from .. import ops
from ..config import DecodeConfig, Role
from ..errors import DecodingError
from ..forest.language import LanguageForest
from ..ops.sample_tokens import SampledTokens, proposal_logprobs
from ..ops.topk_logprobs import clean_logits
from ..results import Certificate, StepTrace
from ..rollouts.rows import RowMap
from ..rollouts.state import RolloutState
from ..rollouts.stopping import StopStrings
from ..rollouts.streams import stream_keys
from ..transfer.certificate import kl_divergence
from ..transfer.roles import distinct

# Takes the place of the candidate in the key of a random stream; no token has this id.
_NO_CANDIDATE = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One response and the laws that it was drawn from; T tokens, natural logs in fp32.

    Attributes:
        tree: the tree that it belongs to.
        token_ids: its tokens, an EOS included.
        policy_logprobs: log-prob `[T]` of each token before temperature and truncation.
        drawn_logprobs: log density `[T]` that each token was drawn from; 0 for arg max.
        logprobs: log-prob `[T]` of each token under every model, by role.
        divergences: KL `[T]` of the law drawn from to every model, nats, by role.
    """

    tree: int
    token_ids: list[int]
    policy_logprobs: torch.Tensor
    drawn_logprobs: torch.Tensor
    logprobs: dict[str, torch.Tensor]
    divergences: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class MixtureSampler:
    """How responses are drawn; as `RolloutSampler`, from the mixture of `weights`."""

    weights: Mapping[Role, float]
    eos: torch.Tensor
    vocab_size: int
    config: DecodeConfig
    stop: StopStrings

    def advance(self, logits: Mapping[Role, torch.Tensor], state: RolloutState, depth: int) -> None:
        """Draw the token at `depth` of the first responses and record its log-probs and KLs.

        Raises:
            DecodingError: logits that are no law; prompt_idx is the tree.
        """
        config = self.config
        policy = mix_policies(logits, self.weights, self.vocab_size)
        if depth < config.min_new_tokens:
            policy = policy.index_fill(1, self.eos, -math.inf)
        num = policy.shape[0]
        drawn = ops.sample_tokens(
            policy,
            state.keys[:num],
            depth,
            temperature=0.0 if config.strategy == "greedy" else config.rollout_temperature,
            top_k=config.rollout_top_k,
            top_p=config.rollout_top_p,
            seed=config.seed,
            backend=config.backend,
        )
        finished = state.finished[:num]
        broken = (~drawn.valid & ~finished).nonzero()
        if broken.numel():
            tree = int(state.tree[broken[0, 0]])
            raise DecodingError("the logits are not finite", prompt_idx=tree, step=depth)
        state.tokens[:num, depth] = drawn.ids
        state.lengths[:num] += ~finished
        finished |= torch.isin(drawn.ids, self.eos) | (state.lengths[:num] >= state.limits[:num])
        if self.stop:
            responses = state.tokens[:num, : depth + 1].tolist()
            is_met = [self.stop.is_met(token_ids) for token_ids in responses]
            finished |= torch.tensor(is_met, device=finished.device)
        recorded = {"policy": drawn.logprobs, "drawn": drawn.proposal_logprobs}
        recorded |= self._compare(policy, drawn, logits, depth)
        for name, values in recorded.items():
            state.columns[name][:num, depth] = values

    def _compare(
        self,
        policy: torch.Tensor,
        drawn: SampledTokens,
        logits: Mapping[Role, torch.Tensor],
        depth: int,
    ) -> dict[str, torch.Tensor]:
        """Log-prob of the drawn tokens under every model, and KL `[n]` of the law drawn from."""
        config = self.config
        is_greedy = config.strategy == "greedy"
        top_k, top_p = config.rollout_top_k, config.rollout_top_p
        is_plain = (config.rollout_temperature, top_k, top_p) == (1.0, 0, 1.0) and not is_greedy
        is_plain = is_plain and depth >= config.min_new_tokens
        # A model that is itself the law drawn from has no divergence, and its log-prob is known.
        others = [role for role in logits if not (is_plain and self.weights[role] == 1.0)]
        recorded = {f"logprob:{role}": drawn.logprobs for role in logits}
        if others and not is_greedy:
            law = proposal_logprobs(
                policy, temperature=config.rollout_temperature, top_k=top_k, top_p=top_p
            )
        for role in others:
            logprobs = clean_logits(logits[role], self.vocab_size).log_softmax(-1)
            picked = logprobs.gather(1, drawn.ids[:, None]).squeeze(1)
            recorded[f"logprob:{role}"] = picked
            recorded[f"kl:{role}"] = -picked if is_greedy else kl_divergence(law, logprobs)
        return recorded


def sample_responses(
    forests: Mapping[Role, LanguageForest],
    weights: Mapping[Role, float],
    *,
    numbers: Sequence[int],
    prompt_keys: Sequence[int],
    eos: tuple[int, ...],
    stop: StopStrings,
    vocab_size: int,
    config: DecodeConfig,
    on_depth: Callable[[int], None],
) -> list[Drawn]:
    """Draw a response of each of `numbers` for every tree; return them by tree, then number.

    The prefixes and their next-token logits stay as they were: further responses may follow.

    Args:
        forests: one a role (the same one where two roles have one model), prompts encoded, with a
            row for every response and room for `max_new_tokens - 1` tokens a branch.
        weights: c_m of each role.
        numbers: of the responses of a prompt; each has a random stream of its own.
        prompt_keys: one key a tree, of its random stream.
        eos: ids that end a response.
        stop: strings that end it.
        vocab_size: ids from here on are never drawn.
        config: strategy, temperature and truncation of roll-outs, min_new_tokens, max_new_tokens,
            seed.
        on_depth: called after every token of all responses, with their number.

    Raises:
        DecodingError: logits that are no law; prompt_idx is the tree.
    """
    unique = distinct(forests)
    device = next(iter(forests.values())).device
    end_ids = torch.tensor(eos, dtype=torch.int64, device=device)
    sampler = MixtureSampler(weights, end_ids, vocab_size, config, stop)
    trees = [tree for tree in range(len(prompt_keys)) for _ in numbers]
    keys = stream_keys([(key, 0, _NO_CANDIDATE, i) for key in prompt_keys for i in numbers])
    limits = [config.max_new_tokens] * len(trees)
    columns = ["policy", "drawn", *(f"{kind}:{m}" for m in forests for kind in ("logprob", "kl"))]
    state = RolloutState.begin(keys.to(device), limits, trees, columns)
    rows = RowMap(state)
    logits = {role: forest.next_logits[rows.tree] for role, forest in forests.items()}
    for depth in range(config.max_new_tokens):
        sampler.advance(logits, state, depth)
        on_depth(len(trees))
        order = rows.compact()
        if not rows.num_active:
            break
        if order is not None:
            for forest in unique.values():
                forest.cache.take_rows(order, depth)
        tokens = rows.tokens(depth)
        found = {
            forest: forest.forward_rows(tokens, start=depth, tree=rows.tree)
            for forest in unique.values()
        }
        logits = {role: found[forest] for role, forest in forests.items()}
    return _collect(state, list(forests))


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


def _collect(state: RolloutState, roles: Sequence[str]) -> list[Drawn]:
    """Return what came of every response, in the order in which they began."""
    places = state.places
    columns = {name: column[places].cpu() for name, column in state.columns.items()}
    fields = (state.tree, state.lengths, state.tokens)
    drawn: list[Drawn] = []
    for tree, length, tokens in zip(*(field[places].tolist() for field in fields), strict=True):
        own = {name: column[len(drawn), :length] for name, column in columns.items()}
        logprobs = {role: own[f"logprob:{role}"] for role in roles}
        divergences = {role: own[f"kl:{role}"] for role in roles}
        law = own["policy"], own["drawn"]
        drawn.append(Drawn(tree, tokens[:length], *law, logprobs, divergences))
    return drawn


def trace_plain(drawn: Drawn, rewards: torch.Tensor) -> list[StepTrace]:
    """Trace one candidate a step, the token that was drawn; the first step holds all scores."""
    unknown = torch.full((1,), math.nan, dtype=torch.float32)
    scores = [rewards[None]] + [torch.empty(1, 0, dtype=torch.float32)] * (len(drawn.token_ids) - 1)

    def divergence(role: str, step: int) -> float | None:
        found = drawn.divergences.get(role)
        return None if found is None else float(found[step])

    return [
        StepTrace(
            candidates=torch.tensor([token]),
            rewards=scores[step],
            q=unknown,
            q_stderr=unknown,
            ess=unknown,
            prior_logprobs=drawn.policy_logprobs[step, None],
            final_logprobs=drawn.drawn_logprobs[step, None],
            kl_to_sft=divergence("sft", step),
            kl_to_baseline=divergence("baseline", step),
            choice=0,
        )
        for step, token in enumerate(drawn.token_ids)
    ]


def certify_plain(drawn: Drawn, weights: Mapping[Role, float], *, num: int) -> Certificate:
    """Return the certificate of the best of `num` responses (1: of a plain one).

    The best of n diverges from the law that it was drawn from by at most log n - (n - 1) / n, and
    the certificate gives this bound in place of the divergence. For another model it adds the
    winner's own log-ratio, so that the mean over responses bounds the divergence. The divergence of
    a plain response is exact, whatever truncates the law that it was drawn from.
    """
    extra = math.log(num) - (num - 1) / num
    totals: dict[str, float | None] = {"sft": None, "baseline": None}
    for role, logprobs in drawn.logprobs.items():
        if num == 1:
            totals[role] = float(drawn.divergences[role].sum())
        else:
            totals[role] = extra + float((drawn.drawn_logprobs - logprobs).sum())
    taking_part = [role for role, weight in weights.items() if weight != 0.0]
    return Certificate(
        kl_to_sft=totals["sft"],
        kl_to_baseline=totals["baseline"],
        log_prior_mass=0.0,
        prior=taking_part[0] if len(taking_part) == 1 else "mixture",
        kl_bound=None,
        kl_kind="exact" if num == 1 else "at most",
    )
