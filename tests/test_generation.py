"""`model.generate(..., custom_generate=tq_fast.generate)` of transformers."""

from __future__ import annotations

import functools
import gc
import inspect
import threading
import weakref
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    T5Config,
    T5ForConditionalGeneration,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.logits_process import NoBadWordsLogitsProcessor
from transformers.generation.stopping_criteria import MaxTimeCriteria
from transformers.generation.streamers import BaseStreamer

import tq_fast
from tq_fast.forest.language import LanguageForest
from tq_fast.generation import DecodedOutput
from tq_fast.models.tiny import load_tiny_world

WORLD = load_tiny_world()
PROMPTS = list(WORLD.prompts[:3])
STEERED = {"k": 4, "horizon": 4, "alpha": 0.5}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(WORLD.baseline)


@pytest.fixture(scope="module")
def baseline() -> Any:
    return AutoModelForCausalLM.from_pretrained(WORLD.baseline).eval()


@pytest.fixture(scope="module")
def sft() -> Any:
    return AutoModelForCausalLM.from_pretrained(WORLD.sft).eval()


@pytest.fixture(scope="module")
def reward() -> Any:
    return WORLD.reward


def encode(tokenizer: Any, prompts: Any, side: str = "left") -> Any:
    tokenizer = type(tokenizer).from_pretrained(WORLD.baseline, padding_side=side)
    return tokenizer(prompts, return_tensors="pt", padding=True)


def new_tokens(sequences: torch.Tensor, num_prompt: int, tokenizer: Any) -> list[list[int]]:
    """The responses, without what stands behind their end."""
    found = []
    for row in sequences[:, num_prompt:].tolist():
        end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        found.append(row[:end])
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_decodes_as_its_prompts_do(
    tokenizer: Any, baseline: Any, reward: Any, side: str
) -> None:
    inputs = encode(tokenizer, PROMPTS, side)
    assert not inputs.attention_mask.all(), "some prompt is padded"
    found = baseline.generate(
        **inputs, custom_generate=tq_fast.generate, reward=reward, max_new_tokens=16, **STEERED
    )
    expected = tq_fast.decode(
        PROMPTS, baseline, reward, strategy="greedy", max_new_tokens=16, **STEERED
    )
    num_prompt = inputs.input_ids.shape[1]
    longest = max(map(len, expected.sequences))
    assert found.dtype == torch.int64 and found.shape == (3, num_prompt + longest)
    assert torch.equal(found[:, :num_prompt], inputs.input_ids)
    assert new_tokens(found, num_prompt, tokenizer) == [ids.tolist() for ids in expected.sequences]
    for row, ids in zip(found, expected.sequences, strict=True):
        assert (row[num_prompt + len(ids) :] == tokenizer.pad_token_id).all()


def test_sampling_follows_the_seed_and_repeats_come_with_traces(
    tokenizer: Any, baseline: Any, reward: Any
) -> None:
    given = {**STEERED, "seed": 5, "max_new_tokens": 8, "num_return_sequences": 2}
    output = baseline.generate(
        **encode(tokenizer, PROMPTS[:2]),
        custom_generate=tq_fast.generate,
        reward=reward,
        do_sample=True,
        return_dict_in_generate=True,
        **given,
    )
    expected = tq_fast.decode(PROMPTS[:2], baseline, reward, **given)
    assert isinstance(output, DecodedOutput)
    assert output.result == expected
    assert output.sequences.shape[0] == 4
    assert output.result.traces[3][0].candidates.shape == (4,)


def test_the_model_is_the_baseline_beside_sft_and_the_prior_beside_a_baseline(
    tokenizer: Any, baseline: Any, sft: Any, reward: Any
) -> None:
    inputs = encode(tokenizer, PROMPTS[:1])
    given: Any = {"custom_generate": tq_fast.generate, "reward": reward, "max_new_tokens": 8}
    given |= {"return_dict_in_generate": True, **STEERED}
    expected = tq_fast.decode(
        PROMPTS[:1], baseline, reward, sft=sft, strategy="greedy", max_new_tokens=8, **STEERED
    )
    assert baseline.generate(**inputs, sft=sft, **given).result == expected
    assert sft.generate(**inputs, baseline=baseline, **given).result == expected
    with pytest.raises(tq_fast.InvalidArgument, match="the model whose generate is called is sft"):
        sft.generate(**inputs, baseline=baseline, sft=sft, **given)
    own = sft.generate(**inputs, method="controlled_decoding", **given).result
    assert own.certificates[0].prior == "sft"
    assert own.stats.token_forwards.keys() == {"sft", "reward"}
    args = sft.generate(**inputs, method="args", **{**given, "horizon": 0}).result
    assert args.certificates[0].prior == "sft"
    args = baseline.generate(
        **inputs, method="args", **{**given, "horizon": 0, "prior": "baseline"}
    ).result
    assert args.certificates[0].prior == "baseline"


@pytest.mark.parametrize(
    ("method", "options"),
    [("baseline", {"do_sample": True, "temperature": 0.5, "top_k": 7}), ("best_of_n", {"n": 3})],
)
def test_every_method_is_there_by_its_name(
    tokenizer: Any, baseline: Any, reward: Any, method: str, options: Any
) -> None:
    output = baseline.generate(
        **encode(tokenizer, PROMPTS[:1]),
        custom_generate=tq_fast.generate,
        method=method,
        reward=reward,
        max_new_tokens=8,
        return_dict_in_generate=True,
        **options,
    )
    same = {"n": 3} if "n" in options else {"rollout_temperature": 0.5, "rollout_top_k": 7}
    preset = tq_fast.presets.METHODS[method]
    assert output.result == preset(PROMPTS[:1], baseline, reward, max_new_tokens=8, **same)


def test_lengths_and_ends_are_those_that_generate_was_given(
    tokenizer: Any, baseline: Any, reward: Any
) -> None:
    inputs = encode(tokenizer, PROMPTS[:1])
    num_prompt = inputs.input_ids.shape[1]
    call = functools.partial(
        baseline.generate, **inputs, custom_generate=tq_fast.generate, reward=reward, **STEERED
    )
    assert call(max_length=num_prompt + 3).shape[1] == num_prompt + 3
    assert call(generation_config=GenerationConfig(max_new_tokens=2)).shape[1] == num_prompt + 2
    decoder = tq_fast.TransferDecoder(baseline, reward)
    free = decoder.decode(PROMPTS[0], strategy="greedy", max_new_tokens=6, **STEERED).sequences[0]
    both = free[1:3].tolist()
    several = decoder.decode(
        PROMPTS[0], strategy="greedy", max_new_tokens=6, eos_token_id=tuple(both), **STEERED
    ).sequences[0]
    for ends in (both, torch.tensor(both)):
        assert torch.equal(call(max_new_tokens=6, eos_token_id=ends)[0, num_prompt:], several)
    assert not torch.equal(several, free), "the ids end roll-outs, at least"
    for ends in ({"eos_token_id": int(free[2])}, {"eos_token_id": 262, "min_new_tokens": 5}):
        given = {"max_new_tokens": 6, **ends}
        expected = decoder.decode(PROMPTS[0], strategy="greedy", **given, **STEERED).sequences[0]
        assert torch.equal(call(**given)[0, num_prompt:], expected)
    assert len(expected) >= 5
    stop = tokenizer.decode(free[1:2])
    stopped = call(max_new_tokens=6, stop=stop, return_dict_in_generate=True)
    assert stop not in stopped.result.texts[0]
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [stop])])
    same = call(max_new_tokens=6, stopping_criteria=criteria, return_dict_in_generate=True)
    assert same.result == stopped.result
    config = tq_fast.DecodeConfig(stop=[stop], **STEERED)
    never = StoppingCriteriaList([StopStringCriteria(tokenizer, ["###"])])
    call = functools.partial(
        baseline.generate, **inputs, custom_generate=tq_fast.generate, reward=reward, config=config
    )
    both = call(max_new_tokens=6, stopping_criteria=never, return_dict_in_generate=True)
    assert both.result == stopped.result, "stop strings of config and of criteria all count"


class Listener(BaseStreamer):
    """Remembers what it hears, and which thread of work was done before."""

    def __init__(self) -> None:
        self.heard: list[torch.Tensor] = []
        self.num_scored: list[int] = []
        self.num_ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value)
        self.num_scored.append(len(SCORED))

    def end(self) -> None:
        self.num_ends += 1


SCORED: list[int] = []


def count_words(prompts: Any, responses: Any) -> list[float]:
    SCORED.append(len(responses))
    return [float(len(response.split())) for response in responses]


@pytest.mark.parametrize("is_bound", [False, True])
def test_a_streamer_hears_each_token_when_it_is_chosen(
    tokenizer: Any, baseline: Any, is_bound: bool
) -> None:
    listener = Listener()
    SCORED.clear()
    custom = tq_fast.generate
    if is_bound:
        custom = functools.partial(custom, streamer=listener)
    inputs = encode(tokenizer, PROMPTS[0])
    found = baseline.generate(
        **inputs,
        custom_generate=custom,
        reward=count_words,
        max_new_tokens=6,
        streamer=None if is_bound else listener,
        **STEERED,
    )
    assert torch.equal(listener.heard[0], inputs.input_ids)
    assert torch.cat(listener.heard[1:]).tolist() == found[0, inputs.input_ids.shape[1] :].tolist()
    assert listener.num_ends == 1
    later = listener.num_scored[1:]
    assert later == sorted(set(later)), "between two tokens there was work"


def test_streamers_of_transformers_give_the_text(
    tokenizer: Any, baseline: Any, reward: Any, capsys: Any
) -> None:
    inputs = encode(tokenizer, PROMPTS[0])
    given = {"reward": reward, "max_new_tokens": 8, **STEERED}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=lambda: baseline.generate(
            **inputs, custom_generate=tq_fast.generate, streamer=streamer, **given
        )
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = tq_fast.decode(
        PROMPTS[0], baseline, reward, strategy="greedy", max_new_tokens=8, **STEERED
    )
    whole = tokenizer.decode(expected.sequences[0])
    assert "".join(pieces) == whole and len(pieces) > 3
    baseline.generate(
        **inputs, custom_generate=tq_fast.generate, streamer=TextStreamer(tokenizer), **given
    )
    assert capsys.readouterr().out.strip().endswith(whole.strip())


def test_a_streamer_hears_the_end_of_a_call_that_fails(tokenizer: Any, baseline: Any) -> None:
    listener = Listener()
    with pytest.raises(tq_fast.InvalidArgument, match="reward is needed"):
        baseline.generate(
            **encode(tokenizer, PROMPTS[0]), custom_generate=tq_fast.generate, streamer=listener
        )
    assert listener.num_ends == 1


def test_two_streamers_are_refused_and_both_hear_the_end(tokenizer: Any, baseline: Any) -> None:
    bound, passed = Listener(), Listener()
    with pytest.raises(tq_fast.InvalidArgument, match=r"streamer must be passed .* or bound"):
        baseline.generate(
            **encode(tokenizer, PROMPTS[0]),
            custom_generate=functools.partial(tq_fast.generate, streamer=bound),
            streamer=passed,
            reward=count_words,
        )
    assert bound.num_ends == passed.num_ends == 1


class FalseListener(Listener):
    """False, as a streamer is that counts what it holds; and without a hash, as a list is."""

    __hash__ = None

    def __len__(self) -> int:
        return 0


def test_a_streamer_counts_whatever_its_truth_value_is(tokenizer: Any, baseline: Any) -> None:
    listener = FalseListener()
    baseline.generate(
        **encode(tokenizer, PROMPTS[0]),
        custom_generate=tq_fast.generate,
        reward=count_words,
        max_new_tokens=2,
        streamer=listener,
        **STEERED,
    )
    assert len(listener.heard) == 3 and listener.num_ends == 1


def test_a_streamer_that_raises_leaves_no_buffers(
    tokenizer: Any, baseline: Any, monkeypatch: Any
) -> None:
    opened: list[weakref.ReferenceType[LanguageForest]] = []
    init = LanguageForest.__init__

    def remember(forest: LanguageForest, *given: Any, **options: Any) -> None:
        init(forest, *given, **options)
        opened.append(weakref.ref(forest))

    class Full(Listener):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.heard) == 3:
                raise BufferError("no room for more tokens")

    monkeypatch.setattr(LanguageForest, "__init__", remember)
    with pytest.raises(BufferError) as caught:
        baseline.generate(
            **encode(tokenizer, PROMPTS[0]),
            custom_generate=tq_fast.generate,
            reward=count_words,
            max_new_tokens=6,
            streamer=Full(),
            **STEERED,
        )
    gc.collect()
    assert opened and [forest() for forest in opened] == [None] * len(opened)
    assert caught.traceback, "the error is still there, and holds the frames that it went through"


def test_without_an_id_to_pad_with_a_batch_with_stop_strings_is_refused_before_any_work(
    tokenizer: Any,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(WORLD.baseline).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=None)
    given: Any = {"custom_generate": tq_fast.generate, "reward": count_words, "max_new_tokens": 2}
    SCORED.clear()
    with pytest.raises(tq_fast.InvalidArgument, match="pad_token_id is needed by 3 responses"):
        model.generate(**encode(tokenizer, PROMPTS), stop=".", **given, **STEERED)
    assert not SCORED
    inputs = encode(tokenizer, PROMPTS)
    found = model.generate(**inputs, **given, **STEERED)
    assert found.shape == (3, inputs.input_ids.shape[1] + 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7, "do_sample": True}, "temperature=0.7 is no setting of the method"),
        ({"top_p": 0.7, "do_sample": True}, "or rollout_top_p for the roll-outs"),
        ({"num_beams": 2}, "num_beams must be 1, got 2"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not read"),
        ({"bad_words_ids": [[5]]}, "bad_words_ids=.* is not read"),
        ({"method": "transfer"}, "method must be one of 'sft', .*got 'transfer'"),
        ({"strategy": "greedy", "do_sample": True}, "do_sample=True contradicts strategy"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores must be False"),
        ({"max_time": 3.0}, "stopping_criteria must be stop strings, got MaxTimeCriteria"),
        (
            {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(3.0)])},
            "got MaxTimeCriteria",
        ),
        (
            {
                "logits_processor": LogitsProcessorList(
                    [NoBadWordsLogitsProcessor([[5]], eos_token_id=1)]
                )
            },
            "logits_processor must be empty, got NoBadWordsLogitsProcessor",
        ),
        ({"prefix_allowed_tokens_fn": lambda batch, ids: [5]}, "logits_processor must be empty"),
        ({"config": tq_fast.DecodeConfig(max_new_tokens=9)}, "max_new_tokens is 4 by the settings"),
        ({"alpha": -1.0}, "alpha must be"),
        (
            {"method": "baseline", "temperature": 0.5, "rollout_temperature": 1.5},
            "temperature=0.5 and rollout_temperature=1.5 are one setting",
        ),
        ({"streamer": Listener(), "progress": True}, "progress must be False beside a streamer"),
        ({"stop": 5}, "stop must be a string that is not empty, or several, got 5"),
    ],
)
def test_what_contradicts_is_refused_by_its_name(
    tokenizer: Any, baseline: Any, options: Any, message: str
) -> None:
    SCORED.clear()
    with pytest.raises(tq_fast.InvalidArgument, match=message):
        baseline.generate(
            **encode(tokenizer, PROMPTS[0]),
            custom_generate=tq_fast.generate,
            reward=count_words,
            **{"max_new_tokens": 4, **options},
        )
    assert not SCORED


def test_a_misspelt_option_is_refused_by_transformers(tokenizer: Any, baseline: Any) -> None:
    with pytest.raises(ValueError, match="alhpa"):
        baseline.generate(
            **encode(tokenizer, PROMPTS[0]), custom_generate=tq_fast.generate, alhpa=1.0
        )


def test_the_settings_of_the_models_own_config_are_warned_about(
    tokenizer: Any, reward: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(WORLD.baseline).eval()
    model.generation_config.update(temperature=0.6, do_sample=True, max_new_tokens=5)
    inputs = encode(tokenizer, PROMPTS[0])
    with pytest.warns(UserWarning, match="temperature=0.6"):
        found = model.generate(
            **inputs, custom_generate=tq_fast.generate, reward=reward, eos_token_id=[], **STEERED
        )
    assert found.shape[1] == inputs.input_ids.shape[1] + 5


def test_positions_caches_and_other_inputs_are_refused(tokenizer: Any, baseline: Any) -> None:
    inputs = encode(tokenizer, PROMPTS[0])
    call: Any = functools.partial(
        baseline.generate, **inputs, custom_generate=tq_fast.generate, reward=count_words
    )
    num_prompt = inputs.input_ids.shape[1]
    late = torch.arange(3, 3 + num_prompt)[None]
    for positions in (late, torch.arange(num_prompt), torch.arange(num_prompt - 1)[None]):
        with pytest.raises(tq_fast.InvalidArgument, match=r"position_ids must be .* and count"):
            call(position_ids=positions, max_new_tokens=2)
    shorter = inputs.attention_mask[:, 1:].clone()
    shorter[:, 0] = 0
    for mask, message in (
        (shorter, r"attention_mask must have the shape of input_ids, \(1, "),
        (torch.zeros_like(inputs.attention_mask), r"prompts\[0\] is empty"),
    ):
        with pytest.raises(tq_fast.InvalidArgument, match=message):
            call(attention_mask=mask, max_new_tokens=2)
    cache = baseline(inputs.input_ids[:, :2], use_cache=True).past_key_values
    with pytest.raises(
        tq_fast.InvalidArgument, match=r"(past_key_values|cache) must be empty, got 2 tokens"
    ):
        call(past_key_values=cache, max_new_tokens=2)
    with pytest.raises(tq_fast.InvalidArgument, match="streamer must be None for more than one"):
        call(num_return_sequences=2, do_sample=True, max_new_tokens=2, streamer=Listener())


def test_an_encoder_decoder_model_is_refused() -> None:
    config = T5Config(vocab_size=20, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    with pytest.raises(tq_fast.UnsupportedModel, match="encoder-decoder"):
        model.generate(torch.tensor([[3, 4]]), custom_generate=tq_fast.generate, reward=count_words)


def test_called_by_itself_it_says_how_it_is_called(baseline: Any) -> None:
    with pytest.raises(tq_fast.InvalidArgument, match="pass it as custom_generate="):
        tq_fast.generate(baseline, torch.tensor([[3]]))


def test_no_option_hides_a_setting_of_generate(baseline: Any) -> None:
    ours = inspect.signature(tq_fast.generate).parameters.keys()
    fields = vars(GenerationConfig()).keys()
    assert {"reward", "alpha", "n", "baselines", "value", "seed", "config"} <= ours
    assert not ours & fields
    assert not ours & inspect.signature(baseline.forward).parameters.keys() - {"input_ids"}


def test_a_loaded_reward_and_its_tokenizer_serve(
    tokenizer: Any, baseline: Any, reward: Any
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(reward).eval()
    inputs = encode(tokenizer, PROMPTS[0])
    given = {"max_new_tokens": 6, **STEERED}
    found = baseline.generate(
        **inputs,
        custom_generate=functools.partial(tq_fast.generate, tokenizer=tokenizer),
        reward=model,
        reward_tokenizer=AutoTokenizer.from_pretrained(reward),
        **given,
    )
    same = baseline.generate(**inputs, custom_generate=tq_fast.generate, reward=reward, **given)
    assert torch.equal(found, same)
