"""Stop strings and min_new_tokens end responses where they should; a prompt may have several."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tq_fast
from tests import zoo
from tests.naive import next_token_logprobs
from tq_fast import presets
from tq_fast.errors import InvalidArgument
from tq_fast.rollouts.stopping import StopStrings

# Byte-level: G-with-dot is the space, C-with-dot the new line.
WORDS = [*"abcdefgh.", "\u0120", "\u010a", "ab", ".\u010a", "\u00c3", "\u00a9"]
PROMPTS = ["a", "bc", "d"]
SHORT = {"k": 4, "horizon": 3, "max_new_tokens": 10, "eos_token_id": ()}

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    words.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["<think>"]})
    return made


@functools.cache
def baseline() -> PreTrainedModel:
    return zoo.language_model("llama", vocab_size=len(tokenizer())).requires_grad_(False)


def count_a(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(response.count("a")) for response in responses]


def decode(prompts: Any = PROMPTS, reward: Any = count_a, **options: Any) -> tq_fast.DecodeResult:
    options = {**SHORT, **options}
    return tq_fast.decode(prompts, baseline(), reward, tokenizer=tokenizer(), **options)


def sample(prompts: Any = PROMPTS, **options: Any) -> tq_fast.DecodeResult:
    options = {**SHORT, **options}
    return presets.baseline(prompts, baseline(), tokenizer=tokenizer(), **options)


METHODS = pytest.mark.parametrize("run", [decode, sample])


def ids(text: str) -> list[int]:
    marks = {" ": "\u0120", "\n": "\u010a", ".\n": ".\u010a"}
    return [WORDS.index(marks.get(word, word)) for word in text.split("|")]


@pytest.mark.parametrize(
    ("text", "strings", "is_met", "before", "num_scored"),
    [
        ("c|d", ("x",), False, "cd", 2),
        ("c|d", ("d",), True, "c", 1),
        ("c|d", ("cd",), True, "", 0),
        # The string begins in the middle of a token, which is scored.
        ("c|ab", ("b",), True, "ca", 2),
        ("c|.\n", ("\n",), True, "c.", 2),
        ("c|ab", ("ca",), True, "", 0),
        # The first of several.
        ("c|d|e", ("de", "e", "x"), True, "c", 1),
        ("c|.|.\n", (".\n",), True, "c.", 2),
    ],
)
def test_text_ends_before_the_string(
    text: str, strings: tuple[str, ...], is_met: bool, before: str, num_scored: int
) -> None:
    stop, tokens = StopStrings(strings, tokenizer()), ids(text)
    assert stop.is_met(tokens) == is_met
    assert not any(stop.is_met(tokens[:num]) for num in range(len(tokens)))
    assert stop.text(tokens, skip_special_tokens=True) == before
    assert stop.cut(tokens) == tokens[:num_scored]


def test_a_character_of_several_tokens_is_found_when_it_is_whole() -> None:
    stop, tokens = StopStrings(("\u00e9",), tokenizer()), ids("c|\u00c3|\u00a9")
    assert not stop.is_met(tokens[:2]) and stop.is_met(tokens)
    assert stop.text(tokens, skip_special_tokens=True) == "c"


def test_a_special_token_may_be_the_string() -> None:
    think = tokenizer().convert_tokens_to_ids("<think>")
    stop, tokens = StopStrings(("d<think>",), tokenizer()), [*ids("c|d"), think]
    assert stop.is_met(tokens)
    assert stop.text(tokens, skip_special_tokens=True) == "c"
    assert stop.text([think, *tokens], skip_special_tokens=True) == "c"
    assert stop.text([think, *tokens], skip_special_tokens=False) == "<think>c"


def test_a_string_is_found_behind_any_number_of_tokens() -> None:
    stop = StopStrings(("b" * 30,), tokenizer())
    assert stop.is_met(ids("|".join("c" * 50 + "b" * 30)))
    assert not stop.is_met(ids("|".join("b" * 29)))


@METHODS
def test_a_response_ends_at_the_first_stop_string(run: Any) -> None:
    free = run(seed=3)
    stop = (free.texts[0][2:4], free.texts[1][4])
    stopped = run(seed=3, stop=stop, batch_size=2)
    tok = tokenizer()
    for tokens, text, whole in zip(stopped.sequences, stopped.texts, free.sequences, strict=True):
        tokens = tokens.tolist()
        decoded = tok.decode(tokens)
        first = min((at for s in stop if (at := decoded.find(s)) >= 0), default=len(decoded))
        assert text == decoded[:first].replace("</s>", "").replace("<think>", "")
        assert not any(s in tok.decode(tokens[:-1]) for s in stop)
        if run is sample:
            # The tokens are those of the free response, as far as they go.
            assert tokens == whole.tolist()[: len(tokens)]
    assert len({len(tokens) for tokens in stopped.sequences}) > 1


def test_a_reward_scores_roll_outs_up_to_the_stop_string() -> None:
    seen: set[str] = set()

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        seen.update(responses)
        return count_a(prompts, responses)

    result = decode(reward=reward, stop="c", num_rollouts=2)
    assert seen and not any("c" in text for text in seen)
    assert not any("c" in text for text in result.texts)
    seen.clear()
    options = {**SHORT, "stop": "c", "n": 4}
    best = presets.best_of_n(PROMPTS, baseline(), reward, tokenizer=tokenizer(), **options)
    assert not any("c" in text for text in seen)
    assert set(best.texts) <= seen


@METHODS
def test_stop_needs_text(run: Any) -> None:
    options = {**SHORT, "stop": "c"}
    with pytest.raises(InvalidArgument, match="pass tokenizer="):
        if run is decode:
            tq_fast.decode([[1]], baseline(), lambda p, r: [0.0] * len(r), **options)
        else:
            presets.baseline([[1]], baseline(), **options)


@METHODS
@pytest.mark.parametrize("strategy", ["sample", "greedy"])
def test_no_end_comes_before_min_new_tokens(run: Any, strategy: str) -> None:
    ends = tuple(range(0, len(WORDS), 2))
    options = {"eos_token_id": ends, "strategy": strategy, "max_new_tokens": 6}
    early = run(**options)
    assert min(map(len, early.sequences)) < 4
    for least in (3, 6):
        late = run(**options, min_new_tokens=least)
        for tokens, trace in zip(late.sequences, late.traces, strict=True):
            assert not set(tokens.tolist()[:least]) & set(ends)
            assert len(tokens) == 6 or (len(tokens) > least and int(tokens[-1]) in ends)
            assert not any(set(step.candidates.tolist()) & set(ends) for step in trace[:least])


def test_log_probs_before_min_new_tokens_are_the_models_own() -> None:
    ends = (0, 2, 4)
    options = {"eos_token_id": ends, "min_new_tokens": 2, "max_new_tokens": 4}
    for prompt, tokens, trace in zip(
        PROMPTS, (run := decode(**options)).sequences, run.traces, strict=True
    ):
        context = tokenizer()(prompt)["input_ids"]
        for step in trace:
            law = next_token_logprobs(baseline(), context).float()
            torch.testing.assert_close(step.prior_logprobs, law[step.candidates], rtol=0, atol=3e-5)
            context = [*context, step.token_id]
        assert context[-len(tokens) :] == tokens.tolist()
    drawn = sample(**options)
    for step in (trace[0] for trace in drawn.traces):
        # The law without ends diverges from the model's.
        assert step.kl_to_baseline > 1e-4


def test_min_new_tokens_does_not_depend_on_the_batch() -> None:
    options = {"eos_token_id": (0, 2, 4), "min_new_tokens": 3, "speed": None}
    together, alone = decode(**options), [decode(prompt, **options) for prompt in PROMPTS]
    for idx, one in enumerate(alone):
        assert one.sequences[0].equal(together.sequences[idx])


def test_min_new_tokens_leaves_fewer_candidates() -> None:
    num = len(tokenizer())
    with pytest.raises(InvalidArgument, match=f"tokens but for EOS, {num - 2}, got {num}"):
        decode(k=num, eos_token_id=(1, 2), min_new_tokens=1)


@METHODS
def test_several_responses_stand_prompt_by_prompt(run: Any) -> None:
    one, three = run(), run(num_return_sequences=3, batch_size=4)
    assert len(three.sequences) == len(three.texts) == len(three.traces) == 9
    for idx, tokens in enumerate(one.sequences):
        mine = [ids.tolist() for ids in three.sequences[3 * idx : 3 * idx + 3]]
        assert mine[0] == tokens.tolist()
        assert len({tuple(tokens) for tokens in mine}) > 1
    # Again the same, however many are asked for.
    two = run(num_return_sequences=2)
    assert [ids.tolist() for ids in two.sequences[:2]] == [
        ids.tolist() for ids in three.sequences[:2]
    ]


@METHODS
def test_special_tokens_can_be_kept_in_the_texts(run: Any) -> None:
    options = {"max_new_tokens": 20, "k": len(tokenizer())}
    for skip in (True, False):
        result = run(**options, skip_special_tokens=skip)
        for tokens, text in zip(result.sequences, result.texts, strict=True):
            assert text == tokenizer().decode(tokens, skip_special_tokens=skip)
        assert any("<think>" in text for text in result.texts) != skip


def test_a_reward_and_the_texts_can_both_show_markers() -> None:
    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        return [100.0 * response.startswith("<think>") for response in responses]

    options = {"reward_options": tq_fast.RewardOptions(keep_special_tokens=True)}
    result = decode(reward=reward, k=len(tokenizer()), skip_special_tokens=False, **options)
    assert all(text.startswith("<think>") for text in result.texts)
