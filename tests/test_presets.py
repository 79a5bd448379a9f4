"""Every preset against a small computation of its own, and what all of them share."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

import tq_fast
from tests import zoo
from tests.naive import (
    NaiveSettings,
    classifier_reward,
    decode_naively,
    next_token_logprobs,
)
from tests.ops.statistics import chi_square_excess
from tests.truncation import truncate
from tq_fast import presets
from tq_fast.errors import DecodingError, InvalidArgument, RewardError
from tq_fast.sampling import mix_policies

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [5, 6, 7]]
SHORT = {"k": 4, "horizon": 3, "max_new_tokens": 5, "eos_token_id": ()}
ENDS = tuple(range(5, zoo.VOCAB_SIZE, 6))
# Rounding of other orders of summation; see tests/test_equivalence.py.
ATOL = 3e-5
NEEDED = {
    "sft": ("sft",),
    "baseline": ("baseline",),
    "dera": ("baseline", "sft"),
    "best_of_n": ("baseline", "reward"),
    "args": ("sft", "reward"),
    "controlled_decoding": ("sft", "reward"),
    "transfer_q": ("baseline", "reward"),
    "direct_on_target": ("baseline", "reward"),
    "transfer_q_indirect": ("baseline", "reward", "sft"),
}
EXTRA = {"best_of_n": {"n": 3}, "transfer_q_indirect": {"beta": 0.5}}

pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha"),
    pytest.mark.filterwarnings("ignore:the weights of indirect transfer"),
    pytest.mark.filterwarnings("ignore:transfer='indirect' with one roll-out"),
]


@functools.cache
def models() -> dict[str, PreTrainedModel]:
    return {
        "baseline": zoo.language_model("llama", seed=0).requires_grad_(False),
        "sft": zoo.language_model("llama", seed=5).requires_grad_(False),
        "reward": zoo.classifier("llama"),
    }


def run(method: str, prompts: object = PROMPTS, **options: object) -> tq_fast.DecodeResult:
    """The preset with all models, unless `options` say otherwise."""
    options = {**models(), **SHORT, **EXTRA.get(method, {}), **options}
    for name in presets.FIXED_FIELDS[method]:
        options.pop(name, None)
    return presets.METHODS[method](prompts, **options)


def tokens(result: tq_fast.DecodeResult) -> list[list[int]]:
    return [ids.tolist() for ids in result.sequences]


def test_every_method_of_the_paper_has_a_preset() -> None:
    assert set(presets.METHODS) == set(presets.FIXED_FIELDS) == set(NEEDED)
    for name, method in presets.METHODS.items():
        assert getattr(presets, name) is method


@pytest.mark.parametrize("method", NEEDED)
@pytest.mark.parametrize("strategy", ["sample", "greedy"])
def test_results_do_not_depend_on_the_batch(method: str, strategy: str) -> None:
    if presets.FIXED_FIELDS[method].get("strategy", strategy) != strategy:
        return
    options = {"strategy": strategy, "num_rollouts": 2, "seed": 3, "eos_token_id": ENDS}
    together = tokens(run(method, **options))
    assert tokens(run(method, batch_size=2, **options)) == together
    for idx in range(3):
        assert tokens(run(method, PROMPTS[idx], **options)) == [together[idx]]
    # Four prompts of which not two fit, and of the best of n not even all responses of one.
    budget = {"memory_budget": 45_000 if method == "best_of_n" else 100_000}
    assert tokens(run(method, **budget, **options)) == together
    if strategy == "sample":
        assert tokens(run(method, **{**options, "seed": 4})) != together
        assert together[0] != together[3]


@pytest.mark.parametrize("method", NEEDED)
def test_a_missing_model_is_named_with_the_method(method: str) -> None:
    for name in NEEDED[method]:
        with pytest.raises(InvalidArgument, match=f"^{name} is needed by the method '{method}'"):
            run(method, **{name: None})


@pytest.mark.parametrize("method", NEEDED)
def test_models_that_are_not_needed_may_be_left_out(method: str) -> None:
    unused = {name: None for name in models() if name not in NEEDED[method]}
    options = {"strategy": "greedy", "rollout": "greedy", "max_new_tokens": 3}
    if "strategy" in presets.FIXED_FIELDS[method]:
        del options["strategy"]
    # The prior follows from the models that are given: it is pinned, so that all else is equal.
    if method in ("transfer_q", "direct_on_target"):
        options["prior"] = "baseline"
    if method == "transfer_q_indirect":
        options["rollout"] = "sample"
    without = run(method, **unused, **options)
    assert tokens(without) == tokens(run(method, **options))
    assert all(one.kl_to_sft is None for one in without.certificate) == (
        "sft" not in NEEDED[method]
    )


@pytest.mark.parametrize(
    ("method", "field", "other"),
    [
        ("args", "horizon", 3),
        ("args", "transfer", "indirect"),
        ("args", "candidates_from", "baseline"),
        ("controlled_decoding", "prior", "baseline"),
        ("controlled_decoding", "candidates_from", "baseline"),
        ("transfer_q", "transfer", "indirect"),
        ("direct_on_target", "transfer", "indirect"),
        ("transfer_q_indirect", "transfer", "direct"),
        ("best_of_n", "strategy", "greedy"),
    ],
)
def test_another_value_of_a_fixed_field_is_refused_by_name(
    method: str, field: str, other: object
) -> None:
    call = functools.partial(presets.METHODS[method], [5, 6], **models(), **EXTRA.get(method, {}))
    with pytest.raises(InvalidArgument, match=f"^{field} is .* for the method '{method}'.*{other}"):
        call(**{field: other})
    is_default = getattr(tq_fast.DecodeConfig(), field) == other
    if not is_default:
        settings = {field: other, "beta": 1.0}
        with pytest.raises(InvalidArgument, match=f"^{field} is"):
            call(config=tq_fast.DecodeConfig(**settings))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("transfer_q_indirect", {"beta": None}, "beta is needed by the method"),
        ("transfer_q_indirect", {"weights": "reward_gap"}, "baseline_reward is needed"),
        ("best_of_n", {"n": 0}, "n must be an integer of at least 1, got 0"),
        ("best_of_n", {"source": "reward"}, "source must be one of 'sft', 'baseline'"),
        ("best_of_n", {"source": "sft", "sft": None}, "sft is needed by the method 'best_of_n'"),
        ("args", {"prior": None}, "prior must be one of 'sft', 'baseline', got None"),
        ("args", {"prior": "baseline", "baseline": None}, "baseline is needed"),
        ("dera", {"mix": -0.1}, "mix must be a finite number of at least 0, got -0.1"),
        ("dera", {"mix": math.nan}, "mix must be"),
        ("sft", {"num_rolouts": 3}, "did you mean 'num_rollouts'"),
        ("sft", {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ("sft", {"eos_token_id": zoo.VOCAB_SIZE}, "eos_token_id must be inside"),
        ("sft", {"max_new_tokens": 126}, "that makes 129, but the sft model allows 128"),
        ("args", {"max_new_tokens": 126}, "that makes 129, but the sft model allows 128"),
        ("sft", {"sft": "./no/such/folder"}, "sft='./no/such/folder': there is no such folder"),
        ("args", {"sft": "./no/such/folder"}, "sft='./no/such/folder': there is no such folder"),
        ("dera", {"sft": zoo.language_model("llama", vocab_size=99)}, "sizes 99 and 150"),
    ],
)
def test_bad_options_are_refused(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        run(method, **options)


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
        PROMPTS, tokens(result), result.traces, result.certificate, strict=False
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
        assert result.certificate[0].prior == names[mix]
    else:
        assert result.certificate[0].prior == "mixture"


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


# Five tokens, so that the law of every response can be written down.
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
    """Probability of every response of `policy`, which gives log-probs after a context."""
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
        # The same draws tell this law from its neighbour's.
        assert not set(drawn) <= set(laws[other]) or excess(drawn, laws[other]) > BOUND


def worth(response: Sequence[int]) -> float:
    """Several responses are worth the same: ties."""
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
        # The winner's worth is this one's; among equals each is as likely as under the source.
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
    from_sft = run("best_of_n", source="sft", baseline=None).certificate
    assert [one.kl_to_sft for one in from_sft] == pytest.approx([extra] * len(PROMPTS))
    result = run("best_of_n", source="baseline")
    for prompt, ids, one in zip(PROMPTS, tokens(result), result.certificate, strict=True):
        ratio = 0.0
        for step, token in enumerate(ids):
            context = [*prompt, *ids[:step]]
            laws = [next_token_logprobs(models()[role], context) for role in ("baseline", "sft")]
            ratio += float(laws[0][token] - laws[1][token])
        assert one.kl_to_baseline == pytest.approx(extra, abs=ATOL)
        assert one.kl_to_sft == pytest.approx(extra + ratio, abs=10 * ATOL)


@pytest.mark.parametrize("ends", [(), ENDS], ids=["endless", "with-ends"])
@pytest.mark.parametrize(
    ("method", "options", "roles", "horizon"),
    [
        ("args", {"prior": "sft"}, ("sft", "sft"), 0),
        ("args", {"prior": "baseline"}, ("baseline", "baseline"), 0),
        ("controlled_decoding", {}, ("sft", "sft"), 3),
        ("transfer_q", {}, ("baseline", "sft"), 3),
        ("transfer_q", {"prior": "baseline"}, ("baseline", "baseline"), 3),
        ("direct_on_target", {}, ("baseline", "sft"), 3),
    ],
)
def test_a_steered_method_gives_the_tokens_of_the_naive_loop(
    method: str,
    options: dict[str, object],
    roles: tuple[str, str],
    horizon: int,
    ends: tuple[int, ...],
) -> None:
    rolling, prior = roles
    settings = NaiveSettings(
        k=4,
        horizon=horizon,
        max_new_tokens=5,
        prior="baseline" if rolling == prior else "sft",
        eos_token_id=ends,
    )
    score = classifier_reward(models()["reward"])
    truth = [
        decode_naively(ids, models()[rolling], score, sft=models()["sft"], settings=settings)
        for ids in PROMPTS
    ]
    result = run(method, strategy="greedy", rollout="greedy", eos_token_id=ends, **options)
    assert tokens(result) == [naive.token_ids for naive in truth]
    for trace, naive in zip(result.traces, truth, strict=True):
        for ours, theirs in zip(trace, naive.steps, strict=True):
            torch.testing.assert_close(ours.q.double(), theirs.q, rtol=0, atol=ATOL)


def test_indirect_transfer_is_the_decode_of_its_settings() -> None:
    def gap(prompts: list, responses: list) -> list[float]:
        return [float(len(set(response))) for response in responses]

    for weights, needed in (("log_ratio", {}), ("reward_gap", {"baseline_reward": gap})):
        options = {**SHORT, "beta": 0.5, "weights": weights, "num_rollouts": 2, **needed}
        expected = tq_fast.decode(
            PROMPTS, transfer="indirect", **{k: models()[k] for k in models()}, **options
        )
        result = run("transfer_q_indirect", **options)
        assert tokens(result) == tokens(expected)
        for ours, theirs in zip(
            itertools.chain(*result.traces), itertools.chain(*expected.traces), strict=True
        ):
            assert torch.equal(ours.q, theirs.q) and torch.equal(ours.ess, theirs.ess)


@pytest.mark.parametrize("method", ["args", "controlled_decoding"])
def test_where_the_sft_model_plays_every_part_the_result_says_so(method: str) -> None:
    result = run(method, reward_bounds=(-20.0, 20.0), alpha=2.0)
    assert set(result.stats.token_forwards) == {"sft", "reward"}
    for trace, certificate in zip(result.traces, result.certificate, strict=True):
        assert certificate.prior == "sft" and certificate.kl_to_baseline is None
        assert certificate.kl_to_sft == pytest.approx(sum(step.kl_to_sft for step in trace))
        bound = len(trace) * 40.0 / 2.0 - certificate.log_prior_mass
        assert certificate.kl_bound == pytest.approx(bound)
        for step in trace:
            law = step.final_logprobs
            expected = float((law.exp() * (law - step.prior_logprobs)).sum())
            assert step.kl_to_sft == pytest.approx(expected, abs=1e-5)
            assert step.kl_to_baseline is None


def test_a_baseline_aligned_to_another_reward_has_no_bound_under_its_own_prior() -> None:
    options = {"reward_bounds": (-20.0, 20.0), "beta": 0.5, "max_new_tokens": 2}
    for prior, is_bounded in (("baseline", False), ("sft", True)):
        target = run("direct_on_target", prior=prior, **options).certificate
        assert all((one.kl_bound is not None) == is_bounded for one in target)
        assert all(
            one.kl_bound is not None
            for one in run("transfer_q", prior=prior, **options).certificate
        )


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
    assert result.stats.token_forwards["baseline"] == 31 + 2 + 1 + 1 + 4 * 4
    alone = run("baseline", given, batch_size=1, **options)
    assert tokens(result) == tokens(alone)
    assert alone.stats.token_forwards["baseline"] == 31 + 32 + 1 + 31 + 4 * 4


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


def test_counts_of_plain_decoding() -> None:
    stats = run("baseline", PROMPTS[:2], sft=None).stats
    assert stats.num_steps == 10 and stats.rollout_steps == 4 and stats.rollouts_run == 0
    assert stats.token_forwards == {"baseline": 3 + 5 + 2 * 4}
    assert set(stats.seconds) == {"prefill", "rollout"}
    assert run("baseline", []).sequences == []


def test_models_by_folder_and_loaded_ones_give_the_same(tmp_path) -> None:
    for role in ("sft", "reward"):
        models()[role].save_pretrained(tmp_path / role)
    folders = {role: tmp_path / role for role in ("sft", "reward")}
    for method in ("sft", "controlled_decoding"):
        loaded = run(method, baseline=None, device="cpu", **folders)
        assert tokens(loaded) == tokens(run(method, baseline=None))
