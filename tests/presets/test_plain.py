"""Plain decoding: one model, a mixture of two, or the best of n, against laws computed apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from tests import zoo
from tests.naive import next_token_logprobs
from tests.ops.statistics import chi_square_excess
from tests.presets.test_presets import ATOL, ENDS, PROMPTS, SHORT, models, run, tokens
from tests.test_speed_options import share_of_low
from tests.truncation import truncate
from tq_fast import presets
from tq_fast.errors import DecodingError, InvalidArgument, RewardError
from tq_fast.presets.laws import mix_policies


@pytest.mark.parametrize("method", ["sft", "baseline"])
@pytest.mark.parametrize("ends", [(), ENDS], ids=["endless", "with-ends"])
def test_greedy_plain_decoding_is_the_arg_max_of_the_model(
    method: str, ends: tuple[int, ...]
) -> None:
    result = run(method, strategy="greedy", eos_token_id=ends, max_new_tokens=8)
    for prompt, ids in zip(PROMPTS, tokens(result), strict=True):
        expected: list[int] = []
        while len(expected) < 8 and not set(expected[-1:]) & set(ends):
            law = next_token_logprobs(models()[method], [*prompt, *expected])
            expected.append(int(law.argmax()))
        assert ids == expected
    if ends:
        assert len({len(ids) for ids in tokens(result)}) > 1


def test_log_probs_and_divergences_of_plain_decoding_are_exact() -> None:
    options = {"rollout_temperature": 0.7, "rollout_top_k": 20, "rollout_top_p": 0.9}
    result = run("baseline", PROMPTS[:2], **options)
    for prompt, ids, trace, certificate in zip(
        PROMPTS, tokens(result), result.traces, result.certificates, strict=False
    ):
        totals = torch.zeros(2, dtype=torch.float64)
        for step, entry in enumerate(trace):
            context = [*prompt, *ids[:step]]
            laws = [next_token_logprobs(models()[role], context) for role in ("sft", "baseline")]
            drawn = truncate(laws[1], 0.7, 20, 0.9)
            kept = drawn > -math.inf
            divergences = [(drawn.exp() * (drawn - law))[kept].sum() for law in laws]
            assert entry.token_id == ids[step] and kept[ids[step]]
            assert float(entry.prior_logprobs) == pytest.approx(float(laws[1][ids[step]]), abs=ATOL)
            assert float(entry.final_logprobs) == pytest.approx(float(drawn[ids[step]]), abs=ATOL)
            found = torch.tensor([entry.kl_to_sft, entry.kl_to_baseline], dtype=torch.float64)
            torch.testing.assert_close(found, torch.stack(divergences), rtol=0, atol=ATOL)
            totals += found
            assert entry.rewards.shape == (1, 0) and entry.q.isnan().all()
        assert certificate.kl_to_sft == pytest.approx(float(totals[0]))
        assert certificate.kl_to_baseline == pytest.approx(float(totals[1]))
        assert certificate.kl_bound is None and certificate.log_prior_mass == 0.0


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0, 1.7])
def test_dera_draws_from_the_mixture_over_the_whole_vocabulary(mix: float) -> None:
    result = run("dera", PROMPTS[:2], mix=mix)
    for prompt, ids, trace in zip(PROMPTS, tokens(result), result.traces, strict=False):
        for step, entry in enumerate(trace):
            context = [*prompt, *ids[:step]]
            sft, baseline = (
                next_token_logprobs(models()[role], context) for role in ("sft", "baseline")
            )
            law = (sft + mix * (baseline - sft)).log_softmax(-1)
            assert float(entry.final_logprobs) == pytest.approx(float(law[ids[step]]), abs=ATOL)
            divergence = float((law.exp() * (law - sft)).sum())
            assert entry.kl_to_sft == pytest.approx(divergence, abs=ATOL)
    names = {0.0: "sft", 1.0: "baseline"}
    if mix in names:
        assert tokens(result) == tokens(run(names[mix], PROMPTS[:2]))
        assert result.certificates[0].prior == names[mix]
    else:
        assert result.certificates[0].prior == "mixture"


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0, 2.0])
def test_a_token_that_one_model_never_gives_has_no_part_in_a_mixture(mix: float) -> None:
    never = -math.inf
    logits = {
        "sft": torch.tensor([[0.0, 1.0, never, never]]),
        "baseline": torch.tensor([[0.0, never, 2.0, never]]),
    }
    law = mix_policies(logits, {"sft": 1.0 - mix, "baseline": mix}, 4).softmax(-1)
    alone = {0.0: [1 / (1 + math.e), math.e / (1 + math.e), 0, 0]}
    alone[1.0] = [1 / (1 + math.e**2), 0, math.e**2 / (1 + math.e**2), 0]
    expected = alone.get(mix, [1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(law, torch.tensor([expected]))


# There are five tokens, so that the law of every response can be written down.
VOCAB_SIZE, END, START = 5, 4, [1, 3]
NUM_DRAWS = 2000
BOUND = 10.0


@functools.cache
def small_model(seed: int) -> PreTrainedModel:
    model = zoo.language_model("llama", seed=seed, vocab_size=VOCAB_SIZE, num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight *= 0.5
    return model.requires_grad_(False)


def small_law(
    policy: Callable[[list[int]], torch.Tensor], length: int = 3
) -> dict[tuple[int, ...], float]:
    """Return the law of responses of `policy`, which gives log-probs after a context."""
    law = {(): 1.0}
    for _ in range(length):
        grown: dict[tuple[int, ...], float] = {}
        for response, mass in law.items():
            if END in response:
                grown[response] = mass
                continue
            for token, share in enumerate(policy([*START, *response]).exp().tolist()):
                if share > 0:
                    grown[(*response, token)] = mass * share
        law = grown
    return law


def excess(drawn: Sequence[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    assert sum(law.values()) == pytest.approx(1.0)
    place = {response: idx for idx, response in enumerate(law)}
    ids = torch.tensor([place[response] for response in drawn])
    return chi_square_excess(ids, torch.tensor(list(law.values()), dtype=torch.float64))


def draws(method: str, **options: object) -> list[tuple[int, ...]]:
    result = presets.METHODS[method](
        [torch.tensor(START)] * NUM_DRAWS,
        small_model(10),
        sft=small_model(11),
        max_new_tokens=3,
        eos_token_id=END,
        batch_size=NUM_DRAWS,
        **options,
    )
    return [tuple(ids) for ids in tokens(result)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rollout_temperature": 2.0, "rollout_top_k": 4, "rollout_top_p": 0.8},
    ],
    ids=str,
)
def test_plain_decoding_follows_the_law_of_its_model(options: dict[str, float]) -> None:
    settings = [
        options.get("rollout_temperature", 1.0),
        options.get("rollout_top_k", VOCAB_SIZE),
        options.get("rollout_top_p", 2.0),
    ]
    laws = {
        role: small_law(
            functools.partial(
                lambda model, ids: truncate(next_token_logprobs(model, ids), *settings),
                small_model(seed),
            )
        )
        for role, seed in (("baseline", 10), ("sft", 11))
    }
    for method, other in (("baseline", "sft"), ("sft", "baseline")):
        drawn = draws(method, **options)
        assert excess(drawn, laws[method]) < BOUND
        # The same draws tell this law from that of the other model.
        assert not set(drawn) <= set(laws[other]) or excess(drawn, laws[other]) > BOUND


def worth(response: Sequence[int]) -> float:
    """Return a worth that several responses have in common, so that there are ties."""
    return float(sum((3, 0, 5, 1, 2)[token] * (place + 1) for place, token in enumerate(response)))


def test_the_best_of_n_follows_its_law() -> None:
    def reward(prompts: list, responses: list) -> list[float]:
        return [worth(response) for response in responses]

    n = 3
    law = small_law(functools.partial(next_token_logprobs, small_model(10)))
    best: dict[tuple[int, ...], float] = {}
    for response, mass in law.items():
        below = sum(m for other, m in law.items() if worth(other) < worth(response))
        equal = sum(m for other, m in law.items() if worth(other) == worth(response))
        # The winner has this worth; among equals each is as likely as under the source model.
        best[response] = ((below + equal) ** n - below**n) * mass / equal
    drawn = draws("best_of_n", reward=reward, n=n)
    assert excess(drawn, best) < BOUND
    assert excess(drawn, law) > BOUND
    divergence = sum(mass * math.log(mass / law[response]) for response, mass in best.items())
    assert divergence <= math.log(n) - (n - 1) / n


def test_the_winner_of_n_is_the_first_with_the_highest_reward() -> None:
    seen: list[list[int]] = []

    def reward(prompts: list, responses: list) -> list[float]:
        seen.extend(responses)
        return [float(response[0] % 3) for response in responses]

    result = run("best_of_n", reward=reward, n=6, source="sft", batch_size=2)
    for idx, (ids, trace) in enumerate(zip(tokens(result), result.traces, strict=True)):
        mine = seen[6 * idx : 6 * idx + 6]
        scores = [response[0] % 3 for response in mine]
        assert ids == mine[scores.index(max(scores))]
        assert len(set(map(tuple, mine))) > 1
        assert trace[0].rewards.tolist() == [scores]
        assert trace[1].rewards.shape == (1, 0)
    assert result.stats.rollouts_run == 6 * len(PROMPTS)
    one = run("best_of_n", n=1, source="sft")
    assert tokens(one) == tokens(run("sft"))


def test_a_small_memory_budget_draws_the_same_responses_in_waves() -> None:
    options = {"n": 12, "eos_token_id": ENDS, "max_new_tokens": 8}
    large = run("best_of_n", **options)
    per_token = 2 * 2 * 2 * 8 * 4  # two layers, keys and values, two heads of eight, fp32
    budget = 40 * 8 * per_token
    small = run("best_of_n", memory_budget=budget, **options)
    assert tokens(small) == tokens(large)
    for ours, theirs in zip(small.traces, large.traces, strict=True):
        torch.testing.assert_close(ours[0].rewards, theirs[0].rewards, rtol=0, atol=ATOL)
    assert small.stats.rollouts_run == large.stats.rollouts_run == 48
    assert small.stats.rollout_steps > 4 * large.stats.rollout_steps
    assert sum(small.stats.peak_kv_bytes.values()) <= budget
    assert sum(large.stats.peak_kv_bytes.values()) > 2 * budget
    with pytest.raises(InvalidArgument, match="memory_budget must be at least"):
        run("best_of_n", memory_budget=1000, **options)


def test_the_certificate_of_the_best_of_n_bounds_its_divergence() -> None:
    extra = math.log(3) - 2 / 3
    from_sft = run("best_of_n", source="sft", baseline=None).certificates
    assert [one.kl_to_sft for one in from_sft] == pytest.approx([extra] * len(PROMPTS))
    result = run("best_of_n", source="baseline")
    for prompt, ids, one in zip(PROMPTS, tokens(result), result.certificates, strict=True):
        ratio = 0.0
        for step, token in enumerate(ids):
            context = [*prompt, *ids[:step]]
            laws = [next_token_logprobs(models()[role], context) for role in ("baseline", "sft")]
            ratio += float(laws[0][token] - laws[1][token])
        assert one.kl_to_baseline == pytest.approx(extra, abs=ATOL)
        assert one.kl_to_sft == pytest.approx(extra + ratio, abs=10 * ATOL)


def test_counts_of_plain_decoding() -> None:
    stats = run("baseline", PROMPTS[:2], sft=None).stats
    assert stats.num_steps == 10 and stats.rollout_steps == 4 and stats.rollouts_run == 0
    assert stats.token_forwards == {"baseline": 3 + 5 + 2 * 4}
    assert set(stats.seconds) == {"prefill", "rollout"}
    assert run("baseline", []).sequences == []


def test_rewards_that_are_wrong_name_the_prompt() -> None:
    def nan(prompts: list, responses: list) -> list[float]:
        return [math.nan if prompt == [13] else 0.0 for prompt in prompts]

    with pytest.raises(RewardError, match="prompt 2, step 0: the reward returned nan"):
        run("best_of_n", reward=nan)
    with pytest.raises(RewardError, match="the reward returned 1 scores for 12 responses"):
        run("best_of_n", reward=lambda prompts, responses: [0.0])

    def fail(prompts: list, responses: list) -> list[float]:
        raise KeyError("no such key")

    with pytest.raises(RewardError, match="no such key") as caught:
        run("best_of_n", reward=fail, batch_size=3)
    assert isinstance(caught.value.__cause__, KeyError)


def test_logits_that_are_no_law_name_prompt_and_step_and_keep_what_is_finished() -> None:
    broken = zoo.language_model("llama", seed=5)
    embedding = broken.get_input_embeddings()
    with torch.no_grad():
        embedding.weight[13] = math.nan
    with pytest.raises(DecodingError, match="prompt 2, step 0: the logits") as caught:
        run("sft", sft=broken, batch_size=2)
    assert sorted(caught.value.finished) == [0, 1]
    assert len(caught.value.finished[0]) == SHORT["max_new_tokens"]


def test_what_prompts_have_in_common_is_encoded_once() -> None:
    start = list(range(40, 70))
    given = [[*start, 5], [*start, 6, 7], [8], [*start, 5]]
    options = {"strategy": "greedy", "sft": None}
    result = run("baseline", given, **options)
    assert result.stats.token_forwards["baseline"] == 31 + 2 + 1 + 4 * 4
    alone = run("baseline", given, batch_size=1, **options)
    assert tokens(result) == tokens(alone)
    assert alone.stats.token_forwards["baseline"] == 31 + 32 + 1 + 31 + 4 * 4


def test_out_of_memory_goes_on_with_fewer_prompts_and_responses() -> None:
    numbers: list[int] = []

    def short(prompts: Sequence[object], responses: Sequence[Sequence[int]]) -> list[float]:
        numbers.append(len(responses))
        if len(responses) > 3:
            raise torch.OutOfMemoryError("no memory")
        return share_of_low(prompts, responses)

    options = {"n": 6, "max_new_tokens": 6}
    plain = run("best_of_n", reward=share_of_low, **options)
    with pytest.warns(UserWarning, match="out of memory with 4 prompts and 24 roll-outs") as caught:
        ours = run("best_of_n", reward=short, **options)
    assert max(numbers) > 3 and min(numbers) <= 3
    assert all(warning.filename != presets.plain.__file__ for warning in caught)
    assert tokens(ours) == tokens(plain)


def test_an_interrupt_keeps_the_batches_that_are_finished() -> None:
    def interrupt(prompts: Sequence[object], responses: Sequence[Sequence[int]]) -> list[float]:
        if PROMPTS[2] in prompts:
            raise KeyboardInterrupt
        return share_of_low(prompts, responses)

    whole = run("best_of_n", reward=share_of_low, n=2, max_new_tokens=3)
    with pytest.raises(KeyboardInterrupt) as caught:
        run("best_of_n", reward=interrupt, n=2, max_new_tokens=3, batch_size=2)
    assert {idx: ids.tolist() for idx, ids in caught.value.finished.items()} == dict(
        enumerate(tokens(whole)[:2])
    )


def test_out_of_memory_with_a_single_response_is_raised() -> None:
    def never(prompts: Sequence[object], responses: Sequence[Sequence[int]]) -> list[float]:
        raise torch.OutOfMemoryError("no memory")

    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        run("best_of_n", reward=never, n=3)
