"""Whole decodes over servers: the tokens of the forest, whichever roles are behind a URL."""

from __future__ import annotations

import copy
import functools
import gc
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

import tq_fast
from tests.ops.statistics import chi_square_excess
from tests.servers.conftest import patient
from tests.servers.fake_server import FakeServer
from tq_fast.errors import InvalidArgument, ServerUnavailable
from tq_fast.models.loading import load_reward
from tq_fast.prompts import read_prompts
from tq_fast.rewards.base import Opening, Texts

pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha"),
    pytest.mark.filterwarnings("ignore:the weights of indirect transfer"),
]

WEIGHTS = Path(tq_fast.__file__).parent / "models" / "tiny" / "weights"
PROMPTS = ["the old cat", "a small bird sat", "the dog"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 6}
STEERED = {**SETTINGS, "k": 4, "alpha": 0.2, "horizon": 4}
GREEDY = {"rollout": "greedy", "strategy": "greedy"}


@functools.cache
def load(role: str) -> PreTrainedModel:
    kind = AutoModelForSequenceClassification if "reward" in role else AutoModelForCausalLM
    return kind.from_pretrained(WEIGHTS / role).eval()


@functools.cache
def tokenizer_of(role: str) -> Any:
    return AutoTokenizer.from_pretrained(WEIGHTS / role)


Served = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, FakeServer]]:
    """A server for each role, which remembers what it computed for the tests before."""
    roles = ("baseline", "sft", "reward")
    started = {role: FakeServer(load(role), tokenizer_of(role), max_logprobs=60) for role in roles}
    yield started
    for fake in started.values():
        fake.close()


@pytest.fixture
def served(servers: dict[str, FakeServer]) -> Served:
    """Models by role, those that are named behind servers of their own."""

    def start(*roles: str, behind: tuple[str, ...]) -> dict[str, Any]:
        moved = {role: patient(servers[role], tokenizer=tokenizer_of(role)) for role in behind}
        return {**here(*roles), **moved}

    return start


def here(*roles: str) -> dict[str, Any]:
    return {role: str(WEIGHTS / role) for role in roles}


def tokens_of(result: tq_fast.DecodeResult) -> list[list[int]]:
    return [ids.tolist() for ids in result.sequences]


METHODS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "transfer_q": (("baseline", "reward"), {**STEERED, **GREEDY}),
    "transfer_q with sft": (("baseline", "sft", "reward"), {**STEERED, **GREEDY}),
    # The noise of the choice has its own stream here, so that the same token is drawn.
    "transfer_q sampled": (("baseline", "sft", "reward"), {**STEERED, "rollout": "greedy"}),
    "transfer_q early": (("baseline", "reward"), {**STEERED, **GREEDY, "min_new_tokens": 6}),
    "args": (("sft", "reward"), {**SETTINGS, "k": 4, "alpha": 0.2, "strategy": "greedy"}),
    "controlled_decoding": (("sft", "reward"), {**STEERED, **GREEDY}),
    "sft": (("sft",), {**SETTINGS, "strategy": "greedy"}),
    "baseline": (("baseline", "sft"), {**SETTINGS, "strategy": "greedy"}),
}


CASES = [
    (name, behind)
    for name, (roles, _) in METHODS.items()
    for behind in ("all", "language models", "reward")
    if "reward" in roles or behind == "all"
]


@pytest.mark.parametrize(("name", "behind"), CASES)
def test_greedy_methods_give_the_tokens_of_the_forest(
    name: str, behind: str, served: Served
) -> None:
    roles, options = METHODS[name]
    moved = tuple(r for r in roles if behind == "all" or (r == "reward") == (behind == "reward"))
    method = getattr(tq_fast.presets, name.split()[0])
    ours = method(PROMPTS, **served(*roles, behind=moved), **options)
    truth = method(PROMPTS, **here(*roles), **options)
    assert tokens_of(ours) == tokens_of(truth)
    for trace, other in zip(ours.traces, truth.traces, strict=True):
        for step, expected in zip(trace, other, strict=True):
            assert step.candidates.tolist() == expected.candidates.tolist()
            torch.testing.assert_close(step.q, expected.q, rtol=0, atol=1e-4, equal_nan=True)
            torch.testing.assert_close(
                step.prior_logprobs, expected.prior_logprobs, rtol=0, atol=1e-4
            )
    for certificate, expected in zip(ours.certificates, truth.certificates, strict=True):
        for field in ("kl_to_sft", "kl_to_baseline"):
            pair = getattr(certificate, field), getattr(expected, field)
            assert pair[0] == pytest.approx(pair[1], abs=1e-3) or pair[0] is None, field


@pytest.mark.parametrize("name", ["best_of_n", "refine", "blocks"])
def test_methods_that_draw_texts_do_not_depend_on_the_batch(name: str, served: Served) -> None:
    own = {
        "best_of_n": {"n": 3},
        "refine": {"first": 2, "branches": 2, "stages": 2},
        "blocks": {"branches": 2, "block_len": 2},
    }[name]
    method = getattr(tq_fast.presets, name)
    models = served("baseline", "reward", behind=("baseline", "reward"))
    together = method(PROMPTS, **models, **own, **SETTINGS, seed=5)
    alone = [method(PROMPTS, **models, **own, **SETTINGS, seed=5, batch_size=1)]
    assert tokens_of(together) == tokens_of(alone[0])
    assert len({tuple(ids) for ids in tokens_of(together)}) > 1


def test_a_lazy_choice_and_reused_rollouts_give_the_tokens_of_full_evaluation(
    served: Served,
) -> None:
    options = {**STEERED, "num_rollouts": 3, "reward_bounds": (-10.0, 10.0), "seed": 3}
    models = served("baseline", "reward", behind=("baseline",))
    lazy = tq_fast.decode(PROMPTS, **models, **options)
    off = tq_fast.SpeedOptions(lazy_argmax=False, reuse_greedy=False, score_once=False)
    full = tq_fast.decode(PROMPTS, **models, **options, speed=off)
    assert tokens_of(lazy) == tokens_of(full)


@pytest.mark.parametrize("truncation", [{}, {"rollout_temperature": 0.7, "rollout_top_k": 5}])
def test_sampled_texts_have_the_law_of_the_model(
    truncation: dict[str, Any], served: Served
) -> None:
    num = 300
    result = tq_fast.presets.baseline(
        [PROMPTS[0]],
        **served("baseline", behind=("baseline",)),
        max_new_tokens=2,
        num_return_sequences=num,
        batch_size=num,
        **truncation,
    )
    tokenizer, model = tokenizer_of("baseline"), load("baseline")
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits[0, -1].double() / truncation.get("rollout_temperature", 1.0)
    if truncation:
        logits[logits < logits.topk(truncation["rollout_top_k"]).values[-1]] = -torch.inf
    first = torch.tensor([sequence[0] for sequence in result.sequences])
    assert chi_square_excess(first, logits.softmax(0)) < 10
    for trace, certificate in zip(result.traces, result.certificates, strict=True):
        drawn = sum(float(step.final_logprobs[0]) for step in trace)
        assert math.isfinite(drawn)
        assert certificate.kl_kind == ("approximate" if truncation else "exact")


def test_indirect_transfer_scores_roll_outs_at_the_server(served: Served) -> None:
    roles = ("baseline", "sft", "reward")
    options = {**STEERED, "transfer": "indirect", "beta": 1.0, "num_rollouts": 2}
    ours = tq_fast.decode(PROMPTS, **served(*roles, behind=("sft",)), **options)
    truth = tq_fast.decode(PROMPTS, **here(*roles), **options)
    assert tokens_of(ours) == tokens_of(truth)


def test_a_server_that_goes_away_loses_no_finished_response(
    serve: Callable[..., FakeServer],
) -> None:
    fake = serve(load("baseline"), tokenizer_of("baseline"))
    server = patient(fake, tokenizer=tokenizer_of("baseline"))
    decoder = tq_fast.TransferDecoder(server, **here("reward"))

    def fail_after(idx: int, result: Any) -> None:
        fake.failures.extend([500] * 1000)

    with pytest.raises(ServerUnavailable) as caught:
        decoder.decode(PROMPTS, **STEERED, **GREEDY, batch_size=1, on_finished=fail_after)
    finished: Any = caught.value.finished  # type: ignore[attr-defined]
    assert list(finished) == [0]


@pytest.mark.parametrize(
    ("method", "roles", "own", "words"),
    [
        ("dera", ("baseline", "sft"), {"mix": 0.5}, "a mixture needs"),
        ("collab", ("reward",), {"k": 2}, "it compares"),
    ],
)
def test_methods_that_read_whole_laws_refuse_a_server(
    method: str, roles: tuple[str, ...], own: dict[str, Any], words: str, served: Served
) -> None:
    models = served("baseline", *roles, behind=("baseline",))
    if method == "collab":
        own = {**own, "baselines": [models.pop("baseline")]}
    with pytest.raises(InvalidArgument, match=words):
        getattr(tq_fast.presets, method)(PROMPTS, **models, **own, **SETTINGS)


def test_a_url_names_a_server_and_its_fields_come_by_model_kwargs(
    serve: Callable[..., FakeServer],
) -> None:
    fake = serve(load("baseline"), tokenizer_of("baseline"), root=str(WEIGHTS / "baseline"))
    result = tq_fast.presets.baseline(
        PROMPTS, fake.url, model_kwargs={"baseline": {"backoff": 0.001}}, **SETTINGS
    )
    assert len(result.sequences) == len(PROMPTS)
    with pytest.raises(InvalidArgument, match="no field of a server"):
        tq_fast.presets.baseline(PROMPTS, fake.url, model_kwargs={"baseline": {"retry": 1}})


def test_a_reward_that_pads_with_its_end_token_is_read_where_it_is_read_here(
    serve: Callable[..., FakeServer],
) -> None:
    model, tokenizer = copy.deepcopy(load("reward")), copy.deepcopy(tokenizer_of("reward"))
    tokenizer.pad_token = tokenizer.eos_token
    end = model.config.pad_token_id = tokenizer.eos_token_id
    fake = serve(model, tokenizer)
    texts = Texts(tokenizer_of("baseline"))

    @torch.no_grad()
    def score(source: Any, prompt: list[int], responses: list[list[int]]) -> list[float]:
        reward = load_reward(
            source,
            "reward",
            tokenizer=tokenizer,
            texts=texts,
            label=None,
            vocab_size=884,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        prompts = read_prompts([prompt], texts.tokenizer, vocab_size=884)
        opening = Opening(prompts, len(responses), max_new=4, backend=None)
        return reward.open(opening).score([0] * len(responses), responses)

    responses = [[60], [60, end], [60, end, end], [60, end, 61, end], [end], []]
    ours = score(patient(fake), [1, 40, 50], responses)
    assert ours == pytest.approx(score(model, [1, 40, 50], responses), abs=1e-5)
    assert ours[0] == ours[1] == ours[2] != ours[3]
    # A text of padding alone keeps a token.
    score(patient(fake), [end], [[end]])
    assert fake.requests[-1][1]["input"] == [[end]]


def connections() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "tq_fast server connection"]


def test_no_thread_outlives_its_decoder(served: Served) -> None:
    gc.collect()
    before = set(connections())
    decoder = tq_fast.TransferDecoder(**served("baseline", "reward", behind=("baseline", "reward")))
    decoder.decode(PROMPTS, **STEERED, **GREEDY)
    own = set(connections()) - before
    assert own
    del decoder
    gc.collect()
    for thread in own:
        # The thread closes its sockets before it ends.
        thread.join(30)
        assert not thread.is_alive()
