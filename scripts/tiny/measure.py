"""Scores of the trained models, measured on the saved weights and the held-out prompts."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tq_fast.models.tiny.gold import baseline_gold_reward, gold_reward

from .whole_responses import load_lm, sample, score

NUM_SAMPLES = 8
SCORERS = ("r_BL", "gold r_BL", "r", "gold r")


@dataclass(frozen=True)
class Average:
    """A mean over prompts and its standard error."""

    mean: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.stderr:.2f}"


@dataclass(frozen=True)
class PolicyScores:
    """One language model: scores of single samples, of the best of several, and its habits."""

    single: dict[str, Average]
    best_under_r: dict[str, Average]
    mean_length: float
    ended: float
    entropy: float
    choices: float
    kl_to_sft: Average


@dataclass(frozen=True)
class WorldScores:
    """The figures that the card reports."""

    policies: dict[str, PolicyScores]
    rank_r_baseline_reward: float
    rank_r_gold: float
    rank_baseline_reward_gold: float
    reward_sd: dict[str, float]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equal values share their mean rank."""

    def ranks(values: Sequence[float]) -> list[float]:
        order = sorted(values)
        first_at = {value: i for i, value in reversed(list(enumerate(order)))}
        last_at = {value: i for i, value in enumerate(order)}
        return [(first_at[value] + last_at[value]) / 2 for value in values]

    return statistics.correlation(ranks(first), ranks(second))


def _average(rows: Sequence[Sequence[float]]) -> Average:
    """Return the average over prompts; ``rows`` holds a list of scores for each prompt."""
    means = [statistics.mean(row) for row in rows]
    return Average(statistics.mean(means), statistics.stdev(means) / math.sqrt(len(means)))


@torch.inference_mode()
def _token_logprobs(
    folder: Path, tokenizer: PreTrainedTokenizerFast, prompts: list[str], responses: list[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probs ``[N, T]`` and entropies ``[N, T]`` (nats) of response tokens, and their
    mask; the response includes EOS."""
    model = load_lm(folder)
    texts = [p + r + tokenizer.eos_token for p, r in zip(prompts, responses, strict=True)]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    prompt_lens = torch.tensor([len(ids) for ids in tokenizer(prompts)["input_ids"]])
    logprobs, entropies = [], []
    for ids, mask in zip(
        inputs["input_ids"].split(64), inputs["attention_mask"].split(64), strict=True
    ):
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        logprobs.append(logits.gather(2, ids[:, 1:, None])[:, :, 0])
        entropies.append(-(logits.exp() * logits).sum(-1))
    positions = torch.arange(1, inputs["input_ids"].shape[1])
    is_response = (positions >= prompt_lens[:, None]) & inputs["attention_mask"][:, 1:].bool()
    return torch.cat(logprobs), torch.cat(entropies), is_response


def _by_prompt(values: Sequence[float], num_prompts: int) -> list[list[float]]:
    return [list(values[i::num_prompts]) for i in range(num_prompts)]


def measure_world(weights: Path, prompts: list[str], seed: int) -> WorldScores:
    """Sample the SFT model and the baseline eight times a prompt and score everything."""
    tokenizer = AutoTokenizer.from_pretrained(weights / "sft")
    asked = prompts * NUM_SAMPLES
    policies: dict[str, PolicyScores] = {}
    columns: dict[str, list[float]] = {}
    for name in ("sft", "baseline"):
        samples = sample(load_lm(weights / name), tokenizer, asked, seed)
        scores = {
            "r_BL": score(weights / "baseline_reward", tokenizer, asked, samples.texts),
            "gold r_BL": baseline_gold_reward(asked, samples.texts),
            "r": score(weights / "reward", tokenizer, asked, samples.texts),
            "gold r": gold_reward(asked, samples.texts),
        }
        rows = {key: _by_prompt(values, len(prompts)) for key, values in scores.items()}
        best = [row.index(max(row)) for row in rows["r"]]
        own, entropies, mask = _token_logprobs(weights / name, tokenizer, asked, samples.texts)
        sft, _, _ = _token_logprobs(weights / "sft", tokenizer, asked, samples.texts)
        log_ratio = ((own - sft) * mask).sum(1).tolist()
        policies[name] = PolicyScores(
            single={key: _average(rows[key]) for key in SCORERS},
            best_under_r={
                key: _average([[row[i]] for row, i in zip(rows[key], best, strict=True)])
                for key in SCORERS
            },
            mean_length=statistics.mean(samples.lengths),
            ended=statistics.mean(map(float, samples.ended)),
            entropy=entropies[mask].mean().item(),
            choices=entropies[mask].exp().mean().item(),
            kl_to_sft=_average(_by_prompt(log_ratio, len(prompts))),
        )
        if name == "sft":
            columns = scores
    return WorldScores(
        policies=policies,
        rank_r_baseline_reward=rank_correlation(columns["r"], columns["r_BL"]),
        rank_r_gold=rank_correlation(columns["r"], columns["gold r"]),
        rank_baseline_reward_gold=rank_correlation(columns["r_BL"], columns["gold r_BL"]),
        reward_sd={key: statistics.stdev(columns[key]) for key in ("r", "r_BL")},
    )
