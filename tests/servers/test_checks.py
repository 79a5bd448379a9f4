"""What is tried before any work: each refusal and each warning, by a server that asks for it."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from transformers import AutoTokenizer

import tq_fast
from tests import zoo
from tests.rewards.conftest import byte_level
from tests.servers.conftest import VOCAB_SIZE, patient
from tests.servers.fake_server import METRICS, NAME
from tq_fast import InvalidArgument, Server, UnsupportedModel
from tq_fast.servers import tokenizers
from tq_fast.servers.checks import open_language_server, open_reward_server
from tq_fast.servers.operations import SamplingLaw

PLAIN, WARM = SamplingLaw(), SamplingLaw(0.7, 50, 0.9)


def opened(fake, *, k=6, law=PLAIN, end_ids=(2,), needs_scores=True, **options):
    """Open a language server and close it again."""
    language = open_language_server(
        patient(fake, **options), k=k, law=law, end_ids=end_ids, needs_scores=needs_scores
    )
    language.close()
    return language


@pytest.fixture
def tiny_tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.mark.parametrize("law", [PLAIN, WARM, SamplingLaw(0.0)], ids=str)
def test_a_server_that_answers_exactly_is_opened_without_a_word(serve, model, law):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        language = opened(serve(model), law=law)
    assert language.vocab_size == language.num_ids == VOCAB_SIZE
    assert (language.model, language.max_length, language.tokenizer) == (NAME, 128, None)
    # As many as the server gives: more than k tell where tokens are equally likely.
    assert language.num_logprobs == 20


def test_a_server_that_is_not_there_is_named():
    server = Server("http://127.0.0.1:9/v1", retries=0, connect_timeout=1.0)
    with pytest.raises(tq_fast.ServerUnavailable, match=r"GET http://127.0.0.1:9/v1/models"):
        open_language_server(server, k=3, law=PLAIN)


def test_a_server_that_is_refused_leaves_no_thread(serve, model):
    with pytest.raises(InvalidArgument):
        opened(serve(model), model="other")
    names = [thread.name for thread in threading.enumerate()]
    assert "tq_fast server connection" not in names


def test_a_model_that_is_not_served_is_named_with_those_that_are(serve, model):
    fake = serve(model, names=("a", "b"))
    with pytest.raises(InvalidArgument, match=r"^model='c' is not served .* serves 'a', 'b'$"):
        opened(fake, model="c")
    with pytest.raises(InvalidArgument, match=r"^model must be one of .*\('a', 'b'\), got None$"):
        opened(fake)
    assert opened(fake, model="b").model == "b"


def test_a_url_of_something_else_is_refused(serve, model):
    fake = serve(model)
    fake.get = lambda path: "<html>welcome</html>"
    with pytest.raises(InvalidArgument, match=r"^url: .* is no list of models"):
        opened(fake)


def test_a_server_of_another_kind_is_refused(serve, model, classifier):
    with pytest.raises(UnsupportedModel, match="--runner pooling --convert classify"):
        open_reward_server(patient(serve(model)))
    with pytest.raises(UnsupportedModel, match="the server completes no texts"):
        opened(serve(classifier))


def test_raw_log_probs_are_refused_where_the_law_is_not_the_models_own(serve, model):
    fake = serve(model, logprobs_mode="raw_logprobs")
    for law in (SamplingLaw(0.7), SamplingLaw(1.0, 5), SamplingLaw(1.0, 0, 0.9)):
        with pytest.raises(UnsupportedModel, match="--logprobs-mode processed_logprobs"):
            opened(fake, law=law)
    assert opened(fake, law=PLAIN)
    assert opened(fake, law=SamplingLaw(0.0))


def test_logits_in_place_of_log_probs_are_refused(serve, model):
    with pytest.raises(UnsupportedModel, match=r"no natural logs .* processed_logprobs"):
        opened(serve(model, logprobs_mode="processed_logits"))


@pytest.mark.parametrize("k", [6, 20])
def test_too_few_log_probs_are_refused(serve, model, k):
    # One more than the candidates and the end id tells whether the last one is tied.
    assert opened(serve(model, max_logprobs=k + 2), k=k).num_logprobs == k + 2
    with pytest.raises(UnsupportedModel, match=rf"the {k + 2} log-probs .* --max-logprobs \d\d"):
        opened(serve(model, max_logprobs=k + 1), k=k)


def test_a_small_vocabulary_is_asked_for_as_a_whole(serve):
    small = zoo.language_model("llama", seed=3, vocab_size=16)
    assert opened(serve(small), k=16, end_ids=()).num_logprobs == 16


def test_scores_of_other_tokens_are_refused(serve, model):
    fake = serve(model, shift_of_scores=1)
    with pytest.raises(UnsupportedModel, match=r"scores 3 tokens with .* by prompt_logprobs"):
        opened(fake)
    assert opened(fake, needs_scores=False)


def test_an_activation_that_cannot_be_switched_off_is_refused(serve, classifier):
    with pytest.raises(UnsupportedModel, match="a sigmoid or a softmax, which no request"):
        open_reward_server(patient(serve(classifier, has_switch=False)))


def test_a_reward_between_0_and_1_without_an_activation_is_none_of_its_kind(serve, classifier):
    shifted = copy.deepcopy(classifier)
    with torch.no_grad():
        shifted.score.weight *= 1e-3
    open_reward_server(patient(serve(shifted))).close()


def test_the_label_of_several_must_be_named(serve):
    fake = serve(zoo.classifier("llama", seed=4, vocab_size=VOCAB_SIZE, num_labels=3))
    with pytest.raises(InvalidArgument, match="label must say which of the server's 3 labels"):
        open_reward_server(patient(fake))
    with pytest.raises(InvalidArgument, match=r"label must be in \[0, 3\), got 3"):
        open_reward_server(patient(fake), label=3)
    reward = open_reward_server(patient(fake), label=2)
    with torch.no_grad():
        expected = fake.model(torch.tensor([[4, 5]])).logits[0, 2].item()
    assert reward.rewards([[4, 5]]) == pytest.approx([expected], abs=1e-5)
    reward.close()


@pytest.fixture(scope="session")
def wide_model():
    return zoo.language_model("llama", seed=3, vocab_size=900)


def test_the_tokenizer_is_found_in_the_folder_that_the_server_names(serve, wide_model, tiny_folder):
    fake = serve(wide_model, AutoTokenizer.from_pretrained(tiny_folder), root=str(tiny_folder))
    language = opened(fake)
    assert language.tokenizer.get_vocab() == fake.tokenizer.get_vocab()
    # Ids that are no tokens are no candidates, though the model knows them.
    assert (language.num_ids, language.vocab_size) == (len(fake.tokenizer), 900)


@pytest.mark.parametrize("given", ["folder", "object"])
def test_a_tokenizer_can_be_given(serve, wide_model, tiny_folder, tiny_tokenizer, given):
    fake = serve(wide_model, tiny_tokenizer)
    assert opened(fake).tokenizer is None
    tokenizer = str(tiny_folder) if given == "folder" else tiny_tokenizer
    assert opened(fake, tokenizer=tokenizer).num_ids == len(tiny_tokenizer)


def test_what_is_no_tokenizer_is_refused(serve, wide_model, tmp_path):
    fake = serve(wide_model)
    with pytest.raises(InvalidArgument, match=r"^tokenizer: none in "):
        opened(fake, tokenizer=str(tmp_path))
    with pytest.raises(InvalidArgument, match=r"^tokenizer must be a hub id, .* got int$"):
        opened(fake, tokenizer=3)


def test_another_tokenizer_is_refused_with_a_text_that_shows_it(serve, wide_model, tiny_tokenizer):
    fake = serve(wide_model, tiny_tokenizer)
    with pytest.raises(InvalidArgument, match=r"^tokenizer differs from the server's: 'The quick"):
        opened(fake, tokenizer=byte_level(400))


def test_a_tokenizer_with_one_more_token_is_refused(
    serve, wide_model, tiny_folder, tiny_tokenizer, monkeypatch
):
    # The ids that are tried all over the vocabulary pass over the new one.
    monkeypatch.setattr(tokenizers, "_NUM_VOCABULARY_PROBES", 60)
    other = AutoTokenizer.from_pretrained(tiny_folder)
    other.add_tokens(["<tool>"])
    with pytest.raises(InvalidArgument, match=r"differs from the server's: .*<tool>"):
        opened(serve(wide_model, tiny_tokenizer), tokenizer=other)


def test_a_server_that_cannot_be_asked_for_ids_is_warned_of(serve, wide_model, tiny_tokenizer):
    with pytest.warns(UserWarning, match="has no /tokenize"):
        opened(serve(wide_model), tokenizer=tiny_tokenizer)


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (METRICS.replace('"16"', '"64"'), "--block-size 32 or less"),
        (METRICS.replace('"True"', '"False"'), "--enable-prefix-caching"),
    ],
)
def test_a_cache_that_costs_more_than_it_has_to_is_warned_of(serve, model, metrics, sentence):
    with pytest.warns(UserWarning, match=sentence) as said:
        opened(serve(model, metrics="# HELP\n" + metrics))
    assert len(said) == 1
    # The warning points at the line that called the package.
    assert said[0].filename == __file__


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_warned_of(serve, model, dtype):
    with pytest.warns(UserWarning, match="rounds logits to half precision"):
        opened(serve(model, logits_dtype=dtype), law=WARM)


@pytest.mark.parametrize("metrics", ["", "# nothing of vLLM's\n"])
def test_a_server_that_says_nothing_of_its_cache_is_not_warned_of(serve, model, metrics):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(serve(model, metrics=metrics))


@pytest.mark.parametrize("k", [0, 1.5])
def test_a_wrong_number_of_candidates_is_refused(serve, model, k):
    with pytest.raises(InvalidArgument, match=f"^k must be an integer of at least 1, got {k}$"):
        opened(serve(model), k=k)
