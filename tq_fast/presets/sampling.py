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
from ..config import DecodeConfig
from ..errors import DecodingError
from ..forest.language import LanguageForest
from ..ops.sample_tokens import proposal_logprobs
from ..ops.topk_logprobs import clean_logits
from ..results import Certificate, StepTrace
from ..rollouts.streams import stream_keys
from ..transfer.certificate import kl_divergence

# Stands where roll-outs have their candidate: no token has this id.
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


class _Rows:
    """Responses in the making, in the order of the caches' rows."""

    def __init__(self, keys: torch.Tensor, roles: Sequence[str], max_new_tokens: int) -> None:
        num_rows, device = keys.shape[0], keys.device
        self.keys = keys
        self.origin = torch.arange(num_rows, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(num_rows, max_new_tokens, dtype=torch.int64, device=device)
        self.columns = {
            name: torch.zeros(num_rows, max_new_tokens, device=device)
            for name in ("policy", "drawn", *(f"{kind}:{m}" for m in roles for kind in _KINDS))
        }

    def permute(self, order: torch.Tensor) -> None:
        fixed = [self.keys, self.origin, self.lengths, self.finished, self.tokens]
        for field in (*fixed, *self.columns.values()):
            field[: order.shape[0]] = field[order]


_KINDS = ("logprob", "kl")


def sample_responses(
    forests: Mapping[str, LanguageForest],
    weights: Mapping[str, float],
    *,
    numbers: Sequence[int],
    prompt_keys: Sequence[int],
    eos: tuple[int, ...],
    config: DecodeConfig,
    on_depth: Callable[[int], None],
) -> list[Drawn]:
    """Draw a response of each of `numbers` for every tree; return them by tree, then number.

    The prefixes and their next-token logits stay as they were: further responses may follow.

    Args:
        forests: one a role, prompts encoded, with a row for every response and room for
            `max_new_tokens - 1` tokens a branch.
        weights: c_m of each role.
        numbers: of the responses of a prompt; each has a random stream of its own.
        prompt_keys: one key a tree, of its random stream.
        eos: ids that end a response.
        config: strategy, temperature and truncation of roll-outs, max_new_tokens, seed.
        on_depth: called after every token of all responses, with their number.

    Raises:
        DecodingError: logits that are no law; prompt_idx is the tree.
    """
    vocab_size = min(forest.vocab_size for forest in forests.values())
    first = next(iter(forests.values()))
    num_trees, num, device = len(prompt_keys), len(numbers), first.device
    row_tree = torch.arange(num_trees, device=device).repeat_interleave(num)
    keys = stream_keys([(key, 0, _NO_CANDIDATE, i) for key in prompt_keys for i in numbers])
    rows = _Rows(keys.to(device), list(forests), config.max_new_tokens)
    end_ids = torch.tensor(eos, dtype=torch.int64, device=device)
    logits = {
        role: forest.next_logits.repeat_interleave(num, 0) for role, forest in forests.items()
    }
    active, tree = num_trees * num, None
    for depth in range(config.max_new_tokens):
        ids = _draw(rows, logits, weights, depth, config, vocab_size, row_tree)
        rows.lengths[:active] += ~rows.finished[:active]
        rows.finished[:active] |= torch.isin(ids, end_ids)
        on_depth(num_trees * num)
        running = (~rows.finished[:active]).nonzero().squeeze(1)
        if depth + 1 == config.max_new_tokens or running.numel() == 0:
            break
        # As for roll-outs: moving rows costs a copy of their KV, a few idle ones cost less.
        if running.numel() <= 0.75 * active:
            order = torch.cat([running, rows.finished[:active].nonzero().squeeze(1)])
            for forest in forests.values():
                forest.cache.take_rows(order, depth)
            rows.permute(order)
            active = running.numel()
            tree = row_tree[rows.origin[:active]]
        tokens = rows.tokens[:active, depth]
        logits = {
            role: forest.forward_rows(tokens, start=depth, tree=tree)
            for role, forest in forests.items()
        }
    return _collect(rows, list(forests), row_tree)


def _draw(
    rows: _Rows,
    logits: Mapping[str, torch.Tensor],
    weights: Mapping[str, float],
    depth: int,
    config: DecodeConfig,
    vocab_size: int,
    row_tree: torch.Tensor,
) -> torch.Tensor:
    """Draw the token at `depth` of the first rows and note it; return its ids `[n]`."""
    policy = mix_policies(logits, weights, vocab_size)
    active = policy.shape[0]
    is_greedy = config.strategy == "greedy"
    heat = {"top_k": config.rollout_top_k, "top_p": config.rollout_top_p}
    drawn = ops.sample_tokens(
        policy,
        rows.keys[:active],
        depth,
        temperature=0.0 if is_greedy else config.rollout_temperature,
        **heat,
        seed=config.seed,
        backend=config.backend,
    )
    broken = (~drawn.valid & ~rows.finished[:active]).nonzero()
    if broken.numel():
        at = int(row_tree[rows.origin[broken[0, 0]]])
        raise DecodingError("the logits are not finite", prompt_idx=at, step=depth)
    rows.tokens[:active, depth] = drawn.ids
    rows.columns["policy"][:active, depth] = drawn.logprobs
    rows.columns["drawn"][:active, depth] = drawn.proposal_logprobs
    is_plain = not is_greedy and config.rollout_temperature == 1.0 and heat["top_p"] == 1.0
    is_plain = is_plain and heat["top_k"] == 0
    law = None
    for role, scores in logits.items():
        if weights[role] == 1.0 and is_plain:
            # The law itself: no divergence, and the log-prob is known.
            rows.columns[f"logprob:{role}"][:active, depth] = drawn.logprobs
            continue
        logprobs = clean_logits(scores, vocab_size).log_softmax(-1)
        picked = logprobs.gather(1, drawn.ids[:, None]).squeeze(1)
        if is_greedy:
            divergence = -picked
        else:
            if law is None:
                law = proposal_logprobs(policy, temperature=config.rollout_temperature, **heat)
            divergence = kl_divergence(law, logprobs)
        rows.columns[f"logprob:{role}"][:active, depth] = picked
        rows.columns[f"kl:{role}"][:active, depth] = divergence
    return drawn.ids


def mix_policies(
    logits: Mapping[str, torch.Tensor], weights: Mapping[str, float], vocab_size: int
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
    mixed = sum(weight * logprobs[role] for role, weight in taking_part.items())
    for law in logprobs.values():
        mixed = mixed.masked_fill(law == -torch.inf, -torch.inf)
    return mixed


def _collect(rows: _Rows, roles: Sequence[str], row_tree: torch.Tensor) -> list[Drawn]:
    back = torch.argsort(rows.origin)
    lengths = rows.lengths[back].tolist()
    tokens = rows.tokens[back].tolist()
    columns = {name: column[back].cpu() for name, column in rows.columns.items()}

    def cut(name: str, row: int) -> torch.Tensor:
        return columns[name][row, : lengths[row]]

    return [
        Drawn(
            tree,
            tokens[row][: lengths[row]],
            cut("policy", row),
            cut("drawn", row),
            {role: cut(f"logprob:{role}", row) for role in roles},
            {role: cut(f"kl:{role}", row) for role in roles},
        )
        for row, tree in enumerate(row_tree.tolist())
    ]


def trace_plain(drawn: Drawn, rewards: torch.Tensor) -> list[StepTrace]:
    """One candidate a step, the token that was drawn; all scores stand in the first step."""
    unknown = torch.full((1,), math.nan)
    scores = [rewards[None]] + [torch.empty(1, 0)] * (len(drawn.token_ids) - 1)

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


def certify_plain(drawn: Drawn, weights: Mapping[str, float], *, num: int) -> Certificate:
    """Return the certificate of the best of `num` responses (1: of a plain one).

    The divergence of the best of n from what it was drawn from is at most log n - (n - 1) / n,
    which stands here in its place; to another model the winner's own log-ratio is added, so that
    the mean over responses is an upper bound on the divergence.
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
    )
