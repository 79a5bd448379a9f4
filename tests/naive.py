"""Transfer Q* as a plain loop with nothing kept between steps, which `tq_fast.decode` must equal.

It is written from docs/develop/method.md and from the published code, without anything of the
package. For every new token: one full forward pass over prompt and response gives the k
candidates; transformers' own `generate` completes each of them; the reward model reads every whole
sequence from its first token; the candidate is chosen by `log pi_prior + Q / alpha`.

The tests take it as the truth, the bench as the time to beat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

# It takes whole sequences (prompt and response ids) and returns one score for each.
SequenceReward = Callable[[list[list[int]]], list[float]]
Role = Literal["sft", "baseline"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NaiveSettings:
    """Settings of the loop, by the names of `tq_fast.DecodeConfig`; defaults are the paper's."""

    k: int = 10
    alpha: float = 1.0
    num_rollouts: int = 1
    horizon: int | None = 20
    max_new_tokens: int = 128
    strategy: Literal["sample", "greedy"] = "greedy"
    rollout: Literal["sample", "greedy"] = "greedy"
    rollout_temperature: float = 1.0
    rollout_top_k: int = 0
    rollout_top_p: float = 1.0
    prior: Role = "baseline"
    candidates_from: Role = "baseline"
    eos_token_id: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class NaiveStep:
    """One step: `[k]` tensors in fp64, and in `rollouts[j]` the n completions of candidate j."""

    candidates: list[int]
    prior_logprobs: torch.Tensor
    q: torch.Tensor
    scores: torch.Tensor
    rollouts: list[list[list[int]]]
    choice: int

    @property
    def margin(self) -> float:
        """The distance from the best to the second best score, on which an arg max depends."""
        best = self.scores.topk(2).values
        return float(best[0] - best[1])


@dataclasses.dataclass(frozen=True)
class NaiveResponse:
    """New token ids, the end-of-sequence token included, and how each was chosen."""

    token_ids: list[int]
    steps: list[NaiveStep]


@torch.inference_mode()
def decode_naively(
    prompt_ids: Sequence[int],
    baseline: PreTrainedModel,
    reward: SequenceReward,
    *,
    sft: PreTrainedModel | None = None,
    settings: NaiveSettings,
) -> NaiveResponse:
    """Decode one prompt. Random draws, if any, come from torch's global generator."""
    response: list[int] = []
    steps: list[NaiveStep] = []
    for step in range(settings.max_new_tokens):
        taken = _take_step([*prompt_ids, *response], step, baseline, reward, sft, settings)
        steps.append(taken)
        response.append(taken.candidates[taken.choice])
        if response[-1] in settings.eos_token_id:
            break
    return NaiveResponse(response, steps)


def classifier_reward(model: PreTrainedModel, label: int = 0) -> SequenceReward:
    """Return a reward whose score is the label `label` of a classifier of whole sequences.

    Sequences of one length go through the model together, others one by one: no padding is added.
    """

    def score(sequences: list[list[int]]) -> list[float]:
        batched = len({len(ids) for ids in sequences}) == 1
        # transformers refuses a batch without a padding id, although nothing is padded here.
        batched = batched and model.config.get_text_config().pad_token_id is not None
        batches = [sequences] if batched else [[ids] for ids in sequences]
        scores: list[float] = []
        for batch in batches:
            ids = torch.tensor(batch, device=model.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            scores += logits[:, label].tolist()
        return scores

    return score


def next_token_logprobs(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return log pi(. | ids) `[V]` in fp64, by a forward pass over all of `ids`."""
    tokens = torch.tensor([list(ids)], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, -1]
    return logits.double().log_softmax(-1).cpu()


def complete(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    num_tokens: int,
    settings: NaiveSettings,
) -> list[list[int]]:
    """Return what `generate` appends to each of `sequences` (all of one length), unpadded."""
    own = getattr(model.generation_config, "eos_token_id", None)
    assert settings.eos_token_id or own is None, f"generate would stop at the model's own eos {own}"
    sampling = {
        "temperature": settings.rollout_temperature,
        "top_k": settings.rollout_top_k,
        "top_p": settings.rollout_top_p,
    }
    is_sampled = settings.rollout == "sample"
    generation = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=is_sampled,
        eos_token_id=list(settings.eos_token_id) or None,
        pad_token_id=settings.eos_token_id[0] if settings.eos_token_id else 0,
        **(sampling if is_sampled else {}),
    )
    ids = torch.tensor([list(sequence) for sequence in sequences], device=model.device)
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=generation
    )
    return [_up_to_end(row, settings) for row in output[:, ids.shape[1] :].tolist()]


def _take_step(
    context: list[int],
    step: int,
    baseline: PreTrainedModel,
    reward: SequenceReward,
    sft: PreTrainedModel | None,
    settings: NaiveSettings,
) -> NaiveStep:
    policies = {"baseline": next_token_logprobs(baseline, context)}
    if sft is not None:
        policies["sft"] = next_token_logprobs(sft, context)
    # The sort is stable, so that equal log-probs stand by rising token id.
    order = policies[settings.candidates_from].sort(descending=True, stable=True).indices
    candidates = order[: settings.k].tolist()

    horizon = settings.horizon
    if horizon is None:
        horizon = settings.max_new_tokens - step - 1
    rollouts: list[list[list[int]]] = [[[]] for _ in candidates]
    num = settings.num_rollouts if settings.rollout == "sample" else 1
    live = [idx for idx, token in enumerate(candidates) if token not in settings.eos_token_id]
    if horizon > 0 and live:
        starts = [[*context, candidates[idx]] for idx in live for _ in range(num)]
        completions = complete(baseline, starts, horizon, settings)
        for place, idx in enumerate(live):
            rollouts[idx] = completions[place * num : (place + 1) * num]

    whole = [
        [*context, token, *tail]
        for token, tails in zip(candidates, rollouts, strict=True)
        for tail in tails
    ]
    rewards = iter(reward(whole))
    q = torch.tensor(
        [sum(next(rewards) for _ in tails) / len(tails) for tails in rollouts], dtype=torch.float64
    )
    prior_logprobs = policies[settings.prior][candidates]
    scores = prior_logprobs + q / settings.alpha
    if settings.strategy == "greedy":
        best = scores.max()
        choice = min(
            (idx for idx in range(len(candidates)) if scores[idx] == best),
            key=lambda idx: candidates[idx],
        )
    else:
        choice = int(torch.multinomial(scores.softmax(-1), 1))
    return NaiveStep(candidates, prior_logprobs, q, scores, rollouts, choice)


def _up_to_end(tokens: list[int], settings: NaiveSettings) -> list[int]:
    for idx, token in enumerate(tokens):
        if token in settings.eos_token_id:
            return tokens[: idx + 1]
    return tokens
