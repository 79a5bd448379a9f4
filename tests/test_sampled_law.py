"""Sampled roll-outs: decode draws its responses from the law of docs/develop/method.md, exactly.

A Llama over five tokens makes everything enumerable: all roll-outs of a candidate with their
probabilities, and from them the law of Q for n roll-outs, of the next token and of the response.
The responses to thousands of equal prompts, each with a random stream of its own, are held against
that law.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

import tq_fast
from tests import zoo
from tests.ops.statistics import chi_square_excess

VOCAB_SIZE = 5
END = 4
PROMPT = [1, 3]
NUM_PROMPTS = 1000
SEEDS = (11, 12)
# Seeds of the models' weights.
BASELINE, SFT = 10, 11
# The chi_square_excess of a right sampler is above 10 with a probability below 1e-9.
BOUND = 10.0
VALUE = {0: 0, 1: 3, 2: -2, 3: 1, END: 2}

# The cases are noisy on purpose: few roll-outs and a small alpha show most.
pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")

Pmf = dict[float, float]


@functools.cache
def language_model(seed: int) -> PreTrainedModel:
    model = zoo.language_model("llama", seed=seed, vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    # Smaller logits leave the law over five tokens some entropy.
    with torch.no_grad():
        model.lm_head.weight *= 0.8
    return model


def reward(response: Sequence[int]) -> float:
    """Return one of few values, so that the law of a mean is quick to enumerate."""
    return 0.25 * sum(VALUE[token] * (1 + place % 2) for place, token in enumerate(response))


def score_all(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
    return [reward(response) for response in responses]


@functools.cache
def logits(seed: int, context: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return language_model(seed)(input_ids=torch.tensor([context])).logits[0, -1].double()


class Law:
    """The law of the response under `options`, which are those of `tq_fast.decode`."""

    def __init__(self, **options: object) -> None:
        self.options = tq_fast.DecodeConfig(eos_token_id=END, **options)

    def responses(self, response: tuple[int, ...] = ()) -> dict[tuple[int, ...], float]:
        """Return the probability of every whole response that starts with `response`."""
        if len(response) == self.options.max_new_tokens or END in response:
            return {response: 1.0}
        law: dict[tuple[int, ...], float] = {}
        for token, probability in self.next_token(response).items():
            for whole, rest in self.responses((*response, token)).items():
                law[whole] = probability * rest
        return law

    def next_token(self, response: tuple[int, ...]) -> dict[int, float]:
        """Return the law of the next token, a sum over all joint values of the candidates' Q."""
        options = self.options
        context = (*PROMPT, *response)
        proposal = logits(BASELINE, context).log_softmax(-1)
        candidates = proposal.topk(options.k).indices.tolist()
        prior = proposal if options.prior != "sft" else logits(SFT, context).log_softmax(-1)
        values = [self.mean_reward(response, token) for token in candidates]
        grid = list(itertools.product(*[pmf.items() for pmf in values]))
        q = torch.tensor([[value for value, _ in cell] for cell in grid], dtype=torch.float64)
        mass = torch.tensor([[mass for _, mass in cell] for cell in grid]).double().prod(1)
        scores = prior[candidates] + q / options.alpha
        if options.strategy == "sample":
            choice = scores.softmax(-1)
        else:
            choice = torch.nn.functional.one_hot(scores.argmax(-1), options.k).double()
        law = (mass[:, None] * choice).sum(0).tolist()
        return dict(zip(candidates, law, strict=True))

    def mean_reward(self, response: tuple[int, ...], token: int) -> Pmf:
        """Return the law of the mean reward of n independent roll-outs of `token`."""
        single: Pmf = Counter()
        for tail, probability in self.rollouts((*response, token)).items():
            single[reward((*response, token, *tail))] += probability
        num = 1 if self.options.rollout == "greedy" or token == END else self.options.num_rollouts
        total: Pmf = {0.0: 1.0}
        for _ in range(num):
            following: Pmf = Counter()
            for (a, p), (b, q) in itertools.product(total.items(), single.items()):
                following[a + b] += p * q
            total = following
        return {value / num: probability for value, probability in total.items()}

    def rollouts(self, response: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        """Return the probability of every roll-out after `response`, candidate included."""
        law = {(): 1.0}
        for _ in range(self.options.horizon):
            grown: dict[tuple[int, ...], float] = {}
            for tail, probability in law.items():
                if END in (*response[-1:], *tail):
                    grown[tail] = probability
                    continue
                step = self.draw(logits(BASELINE, (*PROMPT, *response, *tail)))
                for token, share in enumerate(step.tolist()):
                    if share > 0:
                        grown[(*tail, token)] = probability * share
            law = grown
        return law

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the law of one token of a roll-out: temperature, then top-k, then top-p."""
        options = self.options
        if options.rollout == "greedy":
            return torch.nn.functional.one_hot(scores.argmax(), VOCAB_SIZE).double()
        probs = (scores / options.rollout_temperature).softmax(-1)
        order = probs.argsort(descending=True).tolist()
        if options.rollout_top_k:
            order = order[: options.rollout_top_k]
        probs = probs / probs[order].sum()
        kept, mass = [], 0.0
        for token in order:
            if mass >= options.rollout_top_p:
                break
            kept.append(token)
            mass += float(probs[token])
        law = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
        law[kept] = probs[kept] / probs[kept].sum()
        return law


@functools.cache
def draws(**options: object) -> list[tuple[int, ...]]:
    responses = []
    for seed in SEEDS:
        result = tq_fast.decode(
            [torch.tensor(PROMPT)] * NUM_PROMPTS,
            language_model(BASELINE),
            score_all,
            sft=language_model(SFT) if options.get("prior") == "sft" else None,
            seed=seed,
            eos_token_id=END,
            batch_size=500,
            **options,
        )
        responses += [tuple(ids.tolist()) for ids in result.sequences]
    return responses


def excess(drawn: Sequence[object], law: dict[object, float]) -> float:
    """Return how far `drawn` is from `law`, in standard deviations of the chi-square statistic."""
    assert sum(law.values()) == pytest.approx(1.0)
    outcomes = list(law)
    place = {outcome: idx for idx, outcome in enumerate(outcomes)}
    assert set(drawn) <= set(outcomes)
    ids = torch.tensor([place[outcome] for outcome in drawn])
    return chi_square_excess(ids, torch.tensor([law[o] for o in outcomes], dtype=torch.float64))


SHORT = {"k": 3, "horizon": 2, "max_new_tokens": 1, "alpha": 0.3}


@pytest.mark.parametrize(
    ("options", "neighbour"),
    [
        ({}, {"num_rollouts": 2}),
        ({}, {"rollout": "greedy"}),
        ({}, {"alpha": 0.6}),
        ({"max_new_tokens": 2}, {"num_rollouts": 2}),
        ({"num_rollouts": 2, "max_new_tokens": 2}, {"num_rollouts": 1}),
        ({"rollout": "greedy"}, {"rollout": "sample"}),
        ({"horizon": 1}, {"horizon": 2}),
        ({"strategy": "greedy"}, {"num_rollouts": 2}),
        ({"strategy": "greedy", "num_rollouts": 2}, {"num_rollouts": 1}),
        ({"strategy": "greedy", "max_new_tokens": 2}, {"num_rollouts": 2}),
        ({"rollout_temperature": 0.3}, {"rollout_temperature": 1.0}),
        ({"rollout_temperature": 3.0}, {"rollout_temperature": 1 / 3}),
        ({"rollout_top_k": 1}, {"rollout_top_k": 2}),
        ({"rollout_top_k": 2}, {"rollout_top_k": 0}),
        ({"rollout_top_p": 0.6}, {"rollout_top_p": 1.0}),
        (
            {"rollout_temperature": 2.0, "rollout_top_k": 4, "rollout_top_p": 0.7},
            {"rollout_temperature": 1.0},
        ),
        ({"prior": "sft"}, {"prior": "baseline"}),
        ({"prior": "sft", "strategy": "greedy", "num_rollouts": 2}, {"prior": "baseline"}),
    ],
    ids=str,
)
def test_responses_follow_the_law_and_not_its_neighbour(
    options: dict[str, object], neighbour: dict[str, object]
) -> None:
    options = {**SHORT, **options}
    drawn = draws(**options)
    assert excess(drawn, Law(**options).responses()) < BOUND
    # The same draws do tell this law from one that a mistake might give.
    near = Law(**{**options, **neighbour}).responses()
    assert not set(drawn) <= set(near) or excess(drawn, near) > BOUND


def test_equal_prompts_in_one_call_are_independent() -> None:
    drawn = draws(**SHORT)
    law = Law(**SHORT).responses()
    pairs = {(a, b): law[a] * law[b] for a, b in itertools.product(law, repeat=2)}
    assert excess(list(zip(drawn[0::2], drawn[1::2], strict=True)), pairs) < BOUND


def test_seeds_are_independent() -> None:
    drawn = draws(**SHORT)
    law = Law(**SHORT).responses()
    pairs = {(a, b): law[a] * law[b] for a, b in itertools.product(law, repeat=2)}
    assert excess(list(zip(drawn[:NUM_PROMPTS], drawn[NUM_PROMPTS:], strict=True)), pairs) < BOUND
