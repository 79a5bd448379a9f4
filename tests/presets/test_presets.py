"""Every preset against a small computation of its own, and what all of them share."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from transformers import PreTrainedModel

import tq_fast
from tests import zoo
from tests.naive import NaiveSettings, classifier_reward, decode_naively
from tq_fast import presets
from tq_fast.errors import InvalidArgument
from tq_fast.values.head import ValueHead, ValueHeadConfig

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [5, 6, 7]]
SHORT = {"k": 4, "horizon": 3, "max_new_tokens": 5, "eos_token_id": ()}
ENDS = tuple(range(5, zoo.VOCAB_SIZE, 6))
# Both sides round in fp32, in other orders of summation; see tests/test_equivalence.py.
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
    "value_guided": ("value", "sft"),
    "refine": ("baseline", "reward"),
    "blocks": ("baseline", "reward"),
    "collab": ("reward",),
}
# The methods that draw whole texts hold all roll-outs of a prompt in less memory than this.
SMALL_BUDGETS = {"best_of_n": 45_000, "refine": 45_000, "blocks": 45_000}

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


@functools.cache
def third_model() -> PreTrainedModel:
    return zoo.language_model("llama", seed=6).requires_grad_(False)


@functools.cache
def value_head() -> ValueHead:
    """A head of random weights for the SFT model, which moves its law by some nats a token."""
    generator = torch.Generator().manual_seed(3)
    config = models()["sft"].config
    head = ValueHead(ValueHeadConfig(config.hidden_size, zoo.VOCAB_SIZE, width=8, rank=4))
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return head.requires_grad_(False)


def own_settings(method: str) -> dict[str, object]:
    """The settings of a preset's own in these tests."""
    return {
        "best_of_n": {"n": 3},
        "transfer_q_indirect": {"beta": 0.5},
        "value_guided": {"value": value_head(), "alpha": 8.0},
        "refine": {"first": 3, "branches": 2, "stages": 2},
        "blocks": {"branches": 3, "block_len": 2},
        "collab": {"baseline": None, "baselines": [models()["baseline"], third_model()]},
    }.get(method, {})


def run(method: str, prompts: object = PROMPTS, **options: object) -> tq_fast.DecodeResult:
    """Run the preset with all models, unless `options` say otherwise."""
    options = {**models(), **SHORT, **own_settings(method), **options}
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
    options = {"strategy": strategy, "num_rollouts": 2, "seed": 7, "eos_token_id": ENDS}
    together = tokens(run(method, **options))
    assert tokens(run(method, batch_size=2, **options)) == together
    for idx in range(3):
        assert tokens(run(method, PROMPTS[idx], **options)) == [together[idx]]
    # No two of the four prompts fit into this memory, nor do all n responses of one prompt.
    budget = {"memory_budget": SMALL_BUDGETS.get(method, 100_000)}
    assert tokens(run(method, **budget, **options)) == together
    if strategy == "sample":
        other = tokens(run(method, **{**options, "seed": 6}))
        assert other != together
        assert (together[0], other[0]) != (together[3], other[3])


@pytest.mark.parametrize("method", NEEDED)
def test_a_missing_model_is_named_with_the_method(method: str) -> None:
    for name in NEEDED[method]:
        missing = {name: None}
        if method == "value_guided" and name == "sft":
            # The baseline would take the place of the SFT model.
            missing["baseline"] = None
        with pytest.raises(InvalidArgument, match=f"^{name}.* is needed by the method '{method}'"):
            run(method, **missing)


@pytest.mark.parametrize("method", NEEDED)
def test_models_that_are_not_needed_may_be_left_out(method: str) -> None:
    unused = {name: None for name in models() if name not in NEEDED[method]}
    options = {"strategy": "greedy", "rollout": "greedy", "max_new_tokens": 3}
    if "strategy" in presets.FIXED_FIELDS[method]:
        del options["strategy"]
    # The prior would follow from the models that are given, so it is pinned.
    if method in ("transfer_q", "direct_on_target", "collab"):
        options["prior"] = "baseline"
    if method == "transfer_q_indirect":
        options["rollout"] = "sample"
    without = run(method, **unused, **options)
    assert tokens(without) == tokens(run(method, **options))
    assert all(one.kl_to_sft is None for one in without.certificates) == (
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
    call = functools.partial(presets.METHODS[method], [5, 6], **models(), **own_settings(method))
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
        ("best_of_n", {"source": "reward"}, "source must be one of 'baseline', 'sft', 'value'"),
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
    for trace, certificate in zip(result.traces, result.certificates, strict=True):
        assert certificate.prior == "sft" and certificate.kl_to_baseline is None
        assert certificate.kl_to_sft == pytest.approx(sum(step.kl_to_sft for step in trace))
        bound = len(trace) * 40.0 / 2.0 - certificate.log_prior_mass
        assert certificate.kl_bound == pytest.approx(bound)
        for step in trace:
            law = step.final_logprobs
            expected = float((law.exp() * (law - step.prior_logprobs)).sum())
            assert step.kl_to_sft == pytest.approx(expected, abs=1e-5)
            assert step.kl_to_baseline is None


@pytest.mark.parametrize(
    ("method", "options", "kind"),
    [
        ("transfer_q", {}, "at most"),
        ("transfer_q", {"rollout": "greedy"}, "exact"),
        ("transfer_q", {"horizon": 0}, "exact"),
        ("args", {}, "exact"),
        ("controlled_decoding", {}, "at most"),
        ("best_of_n", {}, "at most"),
        ("best_of_n", {"n": 1}, "exact"),
        ("baseline", {}, "exact"),
        ("sft", {"rollout_temperature": 0.5, "rollout_top_k": 3}, "exact"),
        ("dera", {}, "exact"),
    ],
)
def test_a_divergence_is_called_exact_only_where_q_carries_no_noise(
    method: str, options: dict[str, object], kind: str
) -> None:
    result = run(method, max_new_tokens=3, **options)
    assert [one.kl_kind for one in result.certificates] == [kind] * len(PROMPTS)


def test_a_choice_that_bounds_on_the_reward_settle_has_a_divergence_of_at_most() -> None:
    options = {"rollout": "greedy", "reward_bounds": (-1000.0, 1000.0), "alpha": 1e-3}
    result = run("transfer_q", max_new_tokens=3, **options)
    for trace, one in zip(result.traces, result.certificates, strict=True):
        is_complete = all(step.is_complete for step in trace)
        assert one.kl_kind == ("exact" if is_complete else "at most")


def test_a_baseline_aligned_to_another_reward_has_no_bound_under_its_own_prior() -> None:
    options = {"reward_bounds": (-20.0, 20.0), "beta": 0.5, "max_new_tokens": 2}
    for prior, is_bounded in (("baseline", False), ("sft", True)):
        target = run("direct_on_target", prior=prior, **options).certificates
        assert all((one.kl_bound is not None) == is_bounded for one in target)
        assert all(
            one.kl_bound is not None
            for one in run("transfer_q", prior=prior, **options).certificates
        )


def test_models_by_folder_and_loaded_ones_give_the_same(tmp_path) -> None:
    for role in ("sft", "reward"):
        models()[role].save_pretrained(tmp_path / role)
    folders = {role: tmp_path / role for role in ("sft", "reward")}
    for method in ("sft", "controlled_decoding"):
        loaded = run(method, baseline=None, device="cpu", **folders)
        assert tokens(loaded) == tokens(run(method, baseline=None))


def test_a_method_that_is_open_takes_other_settings_over_the_same_models() -> None:
    opened = presets.open_method("transfer_q", **{**models(), "sft": None}, **SHORT)
    other = opened.with_settings(k=2, strategy="greedy")
    expected = presets.transfer_q(
        PROMPTS, models()["baseline"], models()["reward"], **{**SHORT, "k": 2}, strategy="greedy"
    )
    assert other.decode(PROMPTS) == expected
    assert other.session is opened.session and opened.config.k == 4
    with pytest.raises(InvalidArgument, match="transfer is 'direct' for the method 'transfer_q'"):
        opened.with_settings(transfer="indirect", beta=1.0)
