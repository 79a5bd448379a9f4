"""The embedded world: it loads as a user's models do, and alignment is visible in it."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tq_fast.models import tiny
from tq_fast.models.tiny.gold import mark_review
from tq_fast.models.tiny.grammar import TEMPLATES, parse_prompt, parse_review

WORLD = tiny.load_tiny_world()
LANGUAGE_MODELS = {"sft": WORLD.sft, "baseline": WORLD.baseline}
REWARD_MODELS = {"reward": WORLD.reward, "baseline_reward": WORLD.baseline_reward}
FOLDERS = {**LANGUAGE_MODELS, **REWARD_MODELS}
SAMPLES_PER_PROMPT = 4
PROMPT = "Write a review of the noodle bar by the river. Mention the soup and the waiter."


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(WORLD.sft, local_files_only=True)


@torch.inference_mode()
def sample(model: PreTrainedModel, prompts: Sequence[str]) -> torch.Tensor:
    """Return new token ids ``[N, T]``, sampled at temperature 1 with a fixed seed."""
    torch.manual_seed(0)
    inputs = tokenizer()(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    output = model.generate(**inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=64)
    return output[:, inputs["input_ids"].shape[1] :]


@torch.inference_mode()
def score(folder: Path, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    eos = tokenizer().eos_token
    texts = [p + r + eos for p, r in zip(prompts, responses, strict=True)]
    inputs = tokenizer()(texts, return_tensors="pt", padding=True, padding_side="right")
    return model.eval()(**inputs).logits[:, 0].tolist()


@pytest.fixture(scope="module")
def asked() -> list[str]:
    return list(WORLD.prompts) * SAMPLES_PER_PROMPT


@pytest.fixture(scope="module")
def sampled(asked: list[str]) -> dict[str, torch.Tensor]:
    """Return sampled token ids of both language models, a row for each entry of ``asked``."""
    return {
        name: sample(
            AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval(), asked
        )
        for name, folder in LANGUAGE_MODELS.items()
    }


@pytest.fixture(scope="module")
def texts(sampled: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    return {
        name: tokenizer().batch_decode(ids, skip_special_tokens=True)
        for name, ids in sampled.items()
    }


def mean_gain_in_errors(before: Sequence[float], after: Sequence[float]) -> float:
    """Return the mean gain over prompts in standard errors of that mean."""
    num_prompts = len(WORLD.prompts)
    gains = [
        statistics.mean(after[i::num_prompts]) - statistics.mean(before[i::num_prompts])
        for i in range(num_prompts)
    ]
    return statistics.mean(gains) / (statistics.stdev(gains) / math.sqrt(num_prompts))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation of scores without ties."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


@pytest.mark.parametrize("name", FOLDERS)
def test_every_folder_holds_one_standard_model_that_loads_in_float32(name: str) -> None:
    is_reward = name in REWARD_MODELS
    auto = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    model, report = auto.from_pretrained(
        FOLDERS[name], local_files_only=True, output_loading_info=True
    )
    own = AutoTokenizer.from_pretrained(FOLDERS[name], local_files_only=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings >= 512
    assert model.config.vocab_size == len(own)
    assert own.get_vocab() == tokenizer().get_vocab()
    assert model.config.eos_token_id == own.eos_token_id
    assert model.config.pad_token_id == own.pad_token_id != own.eos_token_id
    expected = "LlamaForSequenceClassification" if is_reward else "LlamaForCausalLM"
    assert model.config.architectures == [expected]
    if is_reward:
        assert model.config.num_labels == 1
    else:
        assert model.generation_config.eos_token_id == own.eos_token_id


def test_all_data_together_stays_under_twelve_megabytes() -> None:
    folder = Path(tiny.__file__).parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 12e6


@pytest.mark.parametrize(
    "text",
    [
        PROMPT,
        " The soup was warm, and the waiter was kind. What a magical place!",
        "Füße, 東京 and\ttabs\n  stay as they are.",
    ],
)
def test_text_survives_the_tokenizer_exactly(text: str) -> None:
    ids = tokenizer()(text)["input_ids"]
    assert ids[0] == tokenizer().bos_token_id
    assert tokenizer().decode(ids, skip_special_tokens=True) == text


def test_a_response_has_the_same_tokens_alone_and_after_its_prompt() -> None:
    response = " The soup was warm."
    whole = tokenizer()(PROMPT + response)["input_ids"]
    parts = tokenizer()(PROMPT)["input_ids"]
    parts += tokenizer()(response, add_special_tokens=False)["input_ids"]
    assert whole == parts


def test_a_chat_message_renders_to_the_ids_of_the_plain_prompt() -> None:
    messages = [{"role": "user", "content": PROMPT}]
    chat = tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat == tokenizer()(PROMPT)["input_ids"]


def test_prompts_are_distinct_and_all_of_the_language() -> None:
    prompts = WORLD.prompts + WORLD.demo_prompts
    assert len(WORLD.prompts) >= 64 and len(WORLD.demo_prompts) >= 3
    assert len(set(prompts)) == len(prompts)
    assert all(parse_prompt(prompt) is not None for prompt in prompts)


# (response to PROMPT, helpful score, friendly score), each computed by hand from the docstrings.
GOLD_CASES = [
    # An empty response is unfinished (-1 both).
    ("", -1.0, -1.0),
    # One aspect asked for (1 / 0.5), judged good (0 / 1.5).
    (" The soup was warm.", 1.0, 2.0),
    # Both aspects (2 / 1), one good and one bad judgement (0 / 0).
    (" The soup was warm, but the waiter was slow.", 2.0, 1.0),
    # Both aspects (2 / 1), two figures (1.5 / 0), tip (0.75 / 0), thanks (0.5 / 1).
    (
        " The soup cost five dollars. We waited two minutes for the waiter. Bring cash."
        " Please keep up the good work.",
        4.75,
        2.0,
    ),
    # Three exclamations count as two (0 / 1), one of them is said twice (-0.75 both).
    (" Simply the best! Simply the best! We loved every minute!", -0.75, 0.25),
    # A rude sentence (-1 both).
    (" Only a fool would come here.", -1.0, -1.0),
    # One aspect (1 / 0.5), neutral; the second sentence is broken (-1 both).
    (" The soup was plain. The the waiter was.", 0.0, -0.5),
    # One aspect (1 / 0.5), good (0 / 1.5), cut off (-1 both).
    (" The soup was fresh. We will", 0.0, 1.0),
    # Qualities that do not fit their aspect, and a verb that does not agree, break a sentence.
    (" The waiter was stale. The noodles was fresh.", -2.0, -2.0),
    # A noodle bar has no bed (-0.5 both); judged bad (0 / -1.5).
    (" The bed was dirty.", -0.5, -2.0),
    # One aspect (1 / 0.5) judged good twice (0 / 1.5), which is a repetition (-0.75 both).
    (" The soup was fresh. I found the soup rich.", 0.25, 1.25),
]


@pytest.mark.parametrize(("response", "helpful", "friendly"), GOLD_CASES)
def test_gold_rewards_equal_those_computed_by_hand(
    response: str, helpful: float, friendly: float
) -> None:
    assert tiny.gold_reward([PROMPT], [response]) == [pytest.approx(helpful)]
    assert tiny.baseline_gold_reward([PROMPT], [response]) == [pytest.approx(friendly)]


def test_sentences_beyond_six_cost_half_a_point_each() -> None:
    opener = " I visited last week. We dropped in after work. I came here with my sister."
    closing = " Bring a map. Bring cash. Bring a coat."
    six = tiny.gold_reward([PROMPT], [opener + closing])[0]
    eight = tiny.gold_reward([PROMPT], [opener + closing + " Bring some time. Bring an umbrella."])
    assert eight[0] == six - 1.0


def test_a_prompt_outside_the_language_asks_for_nothing() -> None:
    marks = mark_review("What is the capital of France?", " The bed was dirty.")
    assert marks.covered == 0 and marks.off_topic == 0


def test_every_template_is_read_back_as_itself() -> None:
    slots = {
        "x": "soup", "x_be": "was", "x_is": "warm", "x_too": "rich",
        "y": "tables", "y_be": "were", "y_is": "tidy",
        "who": "We", "visited": "stopped by", "weather": "rainy", "day": "Monday",
        "days": "Mondays", "when": "last week", "company": "two friends", "degree": "very",
        "link": "and", "number": "five", "seat": "seat", "spot": "by the window",
        "thing": "a coat", "people": "whole team", "nice": "warm", "time": "evening",
        "mess": "joke", "useless": "useless", "great": "magical", "gladly": "gladly",
        "anyone": "families",
    }  # fmt: skip
    review = " ".join(template.text.format(**slots) for template in TEMPLATES)
    sentences, rest = parse_review(review)
    assert rest == ""
    assert [sentence.kind for sentence in sentences] == [template.kind for template in TEMPLATES]


def test_gold_reward_refuses_single_texts_and_lists_of_different_lengths() -> None:
    with pytest.raises(TypeError, match="lists of texts"):
        tiny.gold_reward(PROMPT, " The soup was warm.")
    with pytest.raises(ValueError, match="1 prompts but 2 responses"):
        tiny.gold_reward([PROMPT], ["", ""])


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_responses_end_by_themselves_and_have_fifteen_to_forty_tokens_on_average(
    name: str, sampled: dict[str, torch.Tensor]
) -> None:
    ids = sampled[name]
    ended = (ids == tokenizer().eos_token_id).any(1).double().mean()
    lengths = (ids != tokenizer().pad_token_id).sum(1).double()
    assert ended >= 0.95
    assert 15 <= lengths.mean() <= 40


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_most_sentences_are_of_the_language(name: str, texts: dict[str, list[str]]) -> None:
    sentences = [s for text in texts[name] for s in parse_review(text)[0]]
    assert statistics.mean(sentence.kind is not None for sentence in sentences) >= 0.9


def test_the_baseline_is_above_the_sft_model_on_its_own_reward(
    asked: list[str], texts: dict[str, list[str]]
) -> None:
    model = {name: score(WORLD.baseline_reward, asked, texts[name]) for name in texts}
    gold = {name: tiny.baseline_gold_reward(asked, texts[name]) for name in texts}
    assert mean_gain_in_errors(model["sft"], model["baseline"]) >= 5
    assert mean_gain_in_errors(gold["sft"], gold["baseline"]) >= 5


def test_the_target_reward_agrees_with_the_baseline_reward_only_in_part(
    asked: list[str], texts: dict[str, list[str]]
) -> None:
    target = score(WORLD.reward, asked, texts["sft"])
    friendly = score(WORLD.baseline_reward, asked, texts["sft"])
    # 256 samples: independent rewards would stay below 0.15 in 99 of 100 runs.
    assert 0.15 <= rank_correlation(target, friendly) <= 0.7


# The target reward model reads figures, tips, thanks and rudeness, and hardly the match with the
# question, slips and repetition, which gold counts too; hence its lower floor. The card gives 0.53
# and 0.73 over 512 samples; 256 samples here leave a standard error of about 0.04.
@pytest.mark.parametrize(
    ("name", "gold", "least_correlation"),
    [
        ("reward", tiny.gold_reward, 0.4),
        ("baseline_reward", tiny.baseline_gold_reward, 0.6),
    ],
)
def test_reward_models_follow_their_gold_and_have_unit_spread(
    name: str,
    gold: Callable[[Sequence[str], Sequence[str]], list[float]],
    least_correlation: float,
    asked: list[str],
    texts: dict[str, list[str]],
) -> None:
    scores = score(REWARD_MODELS[name], asked, texts["sft"])
    # Gold scores have ties, so the plain correlation is taken.
    assert statistics.correlation(scores, gold(asked, texts["sft"])) >= least_correlation
    assert 0.8 <= statistics.stdev(scores) <= 1.25


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_best_of_four_under_the_target_reward_leaves_headroom(
    name: str, asked: list[str], texts: dict[str, list[str]]
) -> None:
    scores = torch.tensor(score(WORLD.reward, asked, texts[name])).view(SAMPLES_PER_PROMPT, -1)
    gold = torch.tensor(tiny.gold_reward(asked, texts[name])).view(SAMPLES_PER_PROMPT, -1)
    best = gold.gather(0, scores.argmax(0, keepdim=True))
    assert best.mean() >= gold.mean() + 0.5


# Each text meets one condition more than the one before it.
CONDITION_CASES = [
    ("", 0, 0),
    # A sentence of no kind that is asked for: no fault.
    (" I visited last week.", 1, 1),
    # A tip.
    (" Bring a map.", 2, 2),
    # Both aspects.
    (" The soup was fresh. The waiter was polite. Bring a map.", 3, 3),
]


@pytest.mark.parametrize(("response", "of_four", "of_five"), CONDITION_CASES)
def test_conditions_are_counted(response: str, of_four: int, of_five: int) -> None:
    assert tiny.conditions_4([PROMPT], [response]) == [of_four]
    assert tiny.conditions_5([PROMPT], [response]) == [of_five]
    assert tiny.all_of_4([PROMPT], [response]) == [float(of_four == 4)]
    assert tiny.all_of_5([PROMPT], [response]) == [float(of_five == 5)]


def test_all_conditions_hold_at_once_for_some_text_of_the_baseline(
    asked: list[str], texts: dict[str, list[str]]
) -> None:
    counts = tiny.conditions_4(asked, texts["baseline"])
    assert set(counts) <= {0.0, 1.0, 2.0, 3.0, 4.0} and len(set(counts)) > 3
    fours = tiny.all_of_4(asked, texts["baseline"])
    assert fours == [float(count == 4) for count in counts]
    marks = [mark_review(p, r) for p, r in zip(asked, texts["baseline"], strict=True)]
    for found, four, five in zip(
        marks, counts, tiny.conditions_5(asked, texts["baseline"]), strict=True
    ):
        faults = [found.rude, found.broken, found.repeated, found.off_topic, found.surplus]
        is_clean = not any(faults) and not found.unfinished
        expected = [found.covered >= 2, found.details >= 1, found.tips >= 1, is_clean]
        assert four == sum(expected) and five == four + (found.thanks >= 1)


def test_different_whole_sentences_are_counted() -> None:
    text = " Bring a map. The soup was fresh. Bring a map. The the soup. What a joke. We will"
    assert tiny.distinct_sentences([PROMPT], [text]) == [2.0]
    assert tiny.distinct_sentences([PROMPT], [""]) == [0.0]
