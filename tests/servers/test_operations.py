"""Every operation of a server engine equals what transformers computes directly."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.ops.statistics import chi_square_excess
from tests.servers.conftest import VOCAB_SIZE, patient
from tests.truncation import truncate
from tq_fast import InvalidArgument, UnsupportedModel
from tq_fast.servers.checks import open_language_server, open_reward_server
from tq_fast.servers.operations import RolloutRequest, SamplingLaw

GREEDY, PLAIN = SamplingLaw(temperature=0.0), SamplingLaw()
PREFIXES = ([1, 7, 9], [4], [50, 3, 3, 8, 22], [7, 9], [11, 12, 13, 14])
# The model sees one text at a time here and there; JSON keeps every digit of a double.
NEAR = 1e-5


def law_after(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(0)


@pytest.fixture
def language(serve, model):
    fake = serve(model)
    with_model = open_language_server(patient(fake), k=6, law=SamplingLaw(0.8), end_ids=(2,))
    yield with_model
    with_model.close()


def test_candidates_are_the_likeliest_tokens_in_order(language, model):
    ids, logprobs = language.candidates(PREFIXES, 6)
    for prefix, row, of_row in zip(PREFIXES, ids, logprobs, strict=True):
        law = law_after(model, prefix)
        assert row == law.argsort(descending=True)[:6].tolist()
        assert of_row == pytest.approx(law[row].tolist(), abs=NEAR)


def test_candidates_that_are_left_out_give_way_to_the_next_likeliest(language, model):
    law = law_after(model, PREFIXES[0])
    order = law.argsort(descending=True).tolist()
    ((row,), (of_row,)) = language.candidates(PREFIXES[:1], 6, without=(order[0], order[3]))
    assert row == [order[1], order[2], *order[4:8]]
    # The law stays the model's over all tokens.
    assert of_row == pytest.approx(law[row].tolist(), abs=NEAR)


def test_ids_that_are_no_tokens_are_never_candidates(language, model):
    top = law_after(model, PREFIXES[0]).argsort(descending=True).tolist()
    language.num_ids = max(top[:3])
    ((row,), _) = language.candidates(PREFIXES[:1], 6)
    assert row == [token for token in top if token < language.num_ids][:6]


def test_equally_likely_candidates_come_by_their_ids(serve, model):
    tied = tied_model(model, first=20, num=4)
    fake = serve(tied)
    language = open_language_server(patient(fake), k=6, law=PLAIN)
    ((row,), (of_row,)) = language.candidates([[5]], 3)
    assert row == [20, 21, 22]
    assert len(set(of_row)) == 1
    language.close()


def test_a_tie_that_reaches_past_what_the_server_names_is_refused(serve, model):
    fake = serve(tied_model(model, first=20, num=40))
    language = open_language_server(patient(fake), k=6, law=PLAIN)
    with pytest.raises(UnsupportedModel, match="greater --max-logprobs"):
        language.candidates([[5]], 6)
    language.close()


def tied_model(model, *, first, num):
    """The model with `num` tokens that are equally likely, and likelier than all others."""
    tied = copy.deepcopy(model)
    with torch.no_grad():
        head = tied.lm_head.weight
        head[first : first + num] = 0.0
        head[:first] *= 1e-3
        head[first + num :] *= 1e-3
    # A zero logit is above all others where those are negative.
    tied.lm_head.bias = torch.nn.Parameter(torch.full((VOCAB_SIZE,), -5.0))
    with torch.no_grad():
        tied.lm_head.bias[first : first + num] = 0.0
    return tied


@pytest.mark.parametrize("k", [1, 6])
def test_the_prior_is_the_law_at_any_ids(language, model, k):
    ids = [[(7 * i + 3 * j) % VOCAB_SIZE for j in range(k)] for i in range(len(PREFIXES))]
    for prefix, row, logprobs in zip(PREFIXES, ids, language.prior(PREFIXES, ids), strict=True):
        assert logprobs == pytest.approx(law_after(model, prefix)[row].tolist(), abs=NEAR)


def test_a_prior_over_more_ids_than_one_request_takes_is_asked_for_in_parts(language, model):
    ids = [token % VOCAB_SIZE for token in range(150)]
    (logprobs,) = language.prior([PREFIXES[2]], [ids])
    assert logprobs == pytest.approx(law_after(model, PREFIXES[2])[ids].tolist(), abs=NEAR)


def test_greedy_roll_outs_are_the_arg_max_until_an_end_id(language, model):
    requests = [RolloutRequest(prefix, 3 + i % 2, seed=i) for i, prefix in enumerate(PREFIXES)]
    plain = language.rollouts(requests, GREEDY, ())
    for request, (drawn,) in zip(requests, plain, strict=True):
        text, logprobs = list(request.prefix), []
        for _ in range(request.max_tokens):
            law = law_after(model, text)
            text.append(int(law.argmax()))
            logprobs.append(float(law.max()))
        assert drawn.tokens == text[len(request.prefix) :]
        assert drawn.logprobs == pytest.approx(logprobs, abs=NEAR)
        assert drawn.finish == "length"
    end = plain[0][0].tokens[1]
    ((ended,),) = language.rollouts(requests[:1], GREEDY, (end, 59))
    assert ended.tokens == plain[0][0].tokens[:2]
    assert ended.finish == "stop"


def test_many_requests_of_one_length_go_together_and_come_back_in_order(language, model):
    requests = [RolloutRequest([i % VOCAB_SIZE], 1, seed=0) for i in range(150)]
    drawn = language.rollouts(requests, GREEDY, ())
    expected = [int(law_after(model, request.prefix).argmax()) for request in requests]
    assert [one.tokens for (one,) in drawn] == [[token] for token in expected]


LAWS = [PLAIN, SamplingLaw(0.7), SamplingLaw(1.0, 5), SamplingLaw(1.3, 12, 0.8)]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_sampled_roll_outs_follow_the_law_and_carry_its_log_probs(language, model, law):
    prefix, num = [9, 4], 1500
    ((*drawn,),) = language.rollouts([RolloutRequest(prefix, 1, 5, num)], law, ())
    with torch.no_grad():
        logits = model(torch.tensor([prefix])).logits[0, -1]
    expected = truncate(
        logits, law.temperature, law.top_k or VOCAB_SIZE, law.top_p if law.top_p < 1 else 2.0
    )
    tokens = torch.tensor([one.tokens[0] for one in drawn])
    assert chi_square_excess(tokens, expected.exp()) < 10
    for one in drawn[:50]:
        assert one.logprobs == pytest.approx([float(expected[one.tokens[0]])], abs=NEAR)


def test_roll_outs_of_several_tokens_follow_the_law_of_their_texts(language, model):
    law, prefix = SamplingLaw(1.0, 3), [9, 4]
    ((*drawn,),) = language.rollouts([RolloutRequest(prefix, 2, 17, 2000)], law, ())
    pairs: dict[tuple[int, ...], float] = {}
    for first, of_first in kept(model, prefix, 3):
        for second, of_second in kept(model, [*prefix, first], 3):
            pairs[first, second] = math.exp(of_first + of_second)
    places = {pair: i for i, pair in enumerate(pairs)}
    ids = torch.tensor([places[tuple(one.tokens)] for one in drawn])
    assert chi_square_excess(ids, torch.tensor(list(pairs.values()), dtype=torch.double)) < 10
    sums = [math.fsum(one.logprobs) for one in drawn[:50]]
    expected = [math.log(pairs[tuple(one.tokens)]) for one in drawn[:50]]
    assert sums == pytest.approx(expected, abs=NEAR)


def kept(model, tokens, top_k):
    law = law_after(model, tokens)
    best = law.argsort(descending=True)[:top_k]
    return zip(best.tolist(), law[best].log_softmax(0).tolist(), strict=True)


def test_a_roll_out_is_the_same_alone_as_among_others(language):
    law = SamplingLaw(1.2)
    requests = [RolloutRequest(prefix, 4, 2**63 + 1000 * i, 3) for i, prefix in enumerate(PREFIXES)]
    together = language.rollouts(requests, law, (2,))
    for request, drawn in zip(requests, together, strict=True):
        for i, one in enumerate(drawn):
            alone = RolloutRequest(request.prefix, 4, request.seed + i)
            assert language.rollouts([alone], law, (2,)) == [[one]]
    assert len({tuple(one.tokens) for drawn in together for one in drawn}) > len(PREFIXES)


def test_a_sampled_roll_out_ends_with_its_end_id(language):
    requests = [RolloutRequest(prefix, 12, i, 20) for i, prefix in enumerate(PREFIXES)]
    drawn = [one for row in language.rollouts(requests, SamplingLaw(1.5), (8, 20)) for one in row]
    stopped = [one for one in drawn if one.finish == "stop"]
    assert 0 < len(stopped) < len(drawn)
    assert all(one.tokens[-1] in (8, 20) for one in stopped)
    assert not any({8, 20} & set(one.tokens[:-1]) for one in drawn)
    assert all(len(one.tokens) == len(one.logprobs) for one in drawn)


def test_scores_are_sums_of_log_probs(language, model):
    continuations = [[3, 5], [7], [], [8, 2, 2], [1]]
    expected = []
    for prefix, continuation in zip(PREFIXES, continuations, strict=True):
        text = list(prefix)
        expected.append(0.0)
        for token in continuation:
            expected[-1] += float(law_after(model, text)[token])
            text.append(token)
    assert language.score(PREFIXES, continuations) == pytest.approx(expected, abs=NEAR)


def test_rewards_are_those_of_the_classifier_without_an_activation(serve, classifier):
    reward = open_reward_server(patient(serve(classifier)))
    with torch.no_grad():
        expected = [float(classifier(torch.tensor([text])).logits) for text in PREFIXES]
    assert min(expected) < 0
    assert reward.rewards(PREFIXES) == pytest.approx(expected, abs=NEAR)
    reward.close()


def test_texts_and_token_ids_are_scored_together(serve, tiny_classifier):
    model, tokenizer = tiny_classifier
    reward = open_reward_server(patient(serve(model, tokenizer), tokenizer=tokenizer))
    texts = ["a cat", [5, 6, 7], "the old dog sleeps", [9]]
    ids = [tokenizer(text)["input_ids"] if isinstance(text, str) else text for text in texts]
    with torch.no_grad():
        expected = [float(model(torch.tensor([row])).logits) for row in ids]
    assert reward.rewards(texts) == pytest.approx(expected, abs=NEAR)
    reward.close()


def test_no_prefixes_need_no_request(language):
    assert language.candidates([], 3) == ([], [])
    assert language.prior([], []) == []
    assert language.score([], []) == []
    assert language.rollouts([], PLAIN, ()) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda language: language.candidates([[1] * 128], 3),
        lambda language: language.rollouts([RolloutRequest([1] * 120, 9, 0)], PLAIN, ()),
        lambda language: language.score([[1] * 120], [[2] * 8]),
    ],
)
def test_what_does_not_fit_into_the_context_is_refused(language, call):
    with pytest.raises(InvalidArgument, match=r"context of 128 tokens \(--max-model-len\)"):
        call(language)


def test_an_empty_prefix_is_refused(language):
    with pytest.raises(InvalidArgument, match="a prefix must have at least one token"):
        language.candidates([[]], 3)


def test_several_greedy_roll_outs_of_one_prefix_are_refused(language):
    with pytest.raises(InvalidArgument, match="num must be 1 for greedy roll-outs, got 2"):
        language.rollouts([RolloutRequest([1], 3, 0, num=2)], GREEDY, ())


@pytest.mark.parametrize("temperature", [0.001, -1.0])
def test_a_temperature_that_the_server_would_change_is_refused(temperature):
    with pytest.raises(InvalidArgument, match=f"got {temperature}"):
        SamplingLaw(temperature)


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"num": 0}])
def test_a_roll_out_without_tokens_is_refused(fields):
    with pytest.raises(InvalidArgument, match=f"{next(iter(fields))} must be an integer of at"):
        RolloutRequest(**{"prefix": [1], "max_tokens": 1, "seed": 0, **fields})


def test_a_roll_out_that_ends_at_an_id_of_the_server_is_refused(serve, model):
    fake = serve(model, own_stop_ids=tuple(range(VOCAB_SIZE)))
    language = open_language_server(patient(fake), k=2, law=PLAIN)
    with pytest.raises(UnsupportedModel, match="--override-generation-config"):
        language.rollouts([RolloutRequest([1], 3, 0)], PLAIN, (2,))
    language.close()


def test_a_roll_out_that_the_server_cuts_short_is_refused(serve, model):
    language = open_language_server(patient(serve(model, max_length=96)), k=2, law=PLAIN)
    # As with a server that does not say how long its context is.
    language.max_length = None
    with pytest.raises(UnsupportedModel, match="of at most 90 tokens after 66"):
        language.rollouts([RolloutRequest([1] * 30, 90, 0)], GREEDY, ())
    language.close()


@pytest.mark.parametrize("failure", ["mixed", "abort"])
def test_candidates_that_are_not_whole_are_asked_for_again(serve, model, failure):
    fake = serve(model)
    language = open_language_server(patient(fake), k=6, law=PLAIN)
    expected, num = language.candidates(PREFIXES, 4), len(fake.requests)
    fake.failures += [failure, failure]
    assert language.candidates(PREFIXES, 4) == expected
    assert len(fake.requests) == num + 3
    language.close()


def test_roll_outs_that_the_server_gave_up_are_asked_for_again(serve, model):
    fake = serve(model)
    language = open_language_server(patient(fake), k=6, law=PLAIN)
    requests = [RolloutRequest([1], 3, 7, 2)]
    expected, num = language.rollouts(requests, SamplingLaw(1.1), ()), len(fake.requests)
    fake.failures.append("abort")
    assert language.rollouts(requests, SamplingLaw(1.1), ()) == expected
    # Log-probs of drawn tokens are right whatever else is in the batch.
    fake.failures.append("mixed")
    assert language.rollouts(requests, SamplingLaw(1.1), ()) == expected
    assert len(fake.requests) == num + 3
    language.close()
