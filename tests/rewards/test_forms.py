"""One form of text: a reward reads what its model card's recipe makes of the conversation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

import tq_fast
from tests import zoo
from tests.rewards.templates import TEMPLATES, marked
from tests.rewards.texts import ATOL, encoder, plain_score, scorer
from tq_fast import RewardOptions
from tq_fast.errors import InvalidArgument
from tq_fast.prompts import Prompt, read_prompts
from tq_fast.rewards.base import Opening, Texts
from tq_fast.rewards.causal import CausalReward
from tq_fast.rewards.encoder import EncoderReward

CHAT = [{"role": "user", "content": "What is the fastest way?"}]
ANSWERS = ("Not known.", " With a space", "Two\nlines\n", "", "é 🙂")
BRACKETS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]{% endfor %}"


def read(prompt: Any, tokenizer: PreTrainedTokenizerFast) -> Prompt:
    return read_prompts(prompt, tokenizer, vocab_size=len(tokenizer))[0]


def card(tokenizer: PreTrainedTokenizerFast, chat: list, answer: str) -> list[int]:
    whole = [*chat, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("ends", [(), ("<|im_end|>",), ("</s>",), ("<|im_end|>", "</s>")])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_conversation_reads_as_its_cards_recipe_whether_tokenizers_are_shared_or_not(
    name: str, ends: tuple[str, ...], answer: str
) -> None:
    ours = marked(TEMPLATES[name])
    twin = marked(TEMPLATES[name] + "{# a comment #}")
    other = marked(BRACKETS, num_tokens=330)
    emitted = [*ours(answer)["input_ids"], *ours.convert_tokens_to_ids(list(ends))]
    for theirs in (None, ours, twin, other):
        model = scorer(theirs or ours)
        row = CausalReward(model, theirs, Texts(ours), None).encode(read(CHAT, ours), emitted)
        assert row == card(theirs or ours, CHAT, answer)


@pytest.mark.parametrize("form", ["messages", "text", "ids", "doubled"])
@pytest.mark.parametrize("shares", [True, False])
def test_every_form_of_a_chat_reads_alike(form: str, shares: bool) -> None:
    ours = marked(TEMPLATES["chatml"], adds_start=True)
    theirs = ours if shares else marked(BRACKETS, num_tokens=330, adds_start=True)
    text = ours.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    prompt = {
        "messages": CHAT,
        "text": text,
        "ids": ours(text, add_special_tokens=False)["input_ids"],
        "doubled": ours(text)["input_ids"],
    }[form]
    reward = CausalReward(scorer(theirs), theirs, Texts(ours), None)
    row = reward.encode(read(prompt, ours), ours("yes", add_special_tokens=False)["input_ids"])
    assert row == card(theirs, CHAT, "yes")


def test_a_chat_in_decode_has_the_scores_of_its_cards_recipe() -> None:
    ours = marked(TEMPLATES["chatml"])
    baseline, reward = zoo.language_model("llama", vocab_size=len(ours)), scorer(ours)
    options = {"k": 4, "horizon": 0, "max_new_tokens": 3, "eos_token_id": ()}
    result = tq_fast.decode(
        CHAT, baseline, reward, tokenizer=ours, reward_tokenizer=ours, **options
    )
    emitted: list[int] = []
    for step, token in zip(result.traces[0], result.sequences[0].tolist(), strict=True):
        texts = [
            ours.decode([*emitted, candidate], skip_special_tokens=True)
            for candidate in step.candidates.tolist()
        ]
        expected = [plain_score(reward, card(ours, CHAT, text)) for text in texts]
        assert step.q.tolist() == pytest.approx(expected, abs=ATOL)
        emitted.append(token)


def test_only_what_follows_the_last_marker_is_made_into_tokens_again() -> None:
    ours = marked(TEMPLATES["chatml"])
    reward = CausalReward(scorer(ours), ours, Texts(ours), None)
    form = reward.form(read([{"role": "user", "content": "long " * 200}], ours))
    assert len(form._start_ids) > 200
    assert form._start.endswith("<|im_start|>")


def test_a_last_turn_that_is_continued_stays_one_turn() -> None:
    ours = marked(TEMPLATES["chatml"])
    chat = [*CHAT, {"role": "assistant", "content": "The fastest"}]
    reward = CausalReward(scorer(ours), ours, Texts(ours), None)
    row = reward.encode(read(chat, ours), ours(" way is")["input_ids"])
    assert row == card(ours, CHAT, "The fastest way is")
    (answered,) = read_prompts(
        chat, ours, vocab_size=len(ours), template_options={"continue_final_message": False}
    )
    assert reward.encode(answered, ours("way")["input_ids"]) == card(ours, chat, "way")


def test_a_template_of_a_reward_gets_the_options_of_the_prompt() -> None:
    ours = marked(TEMPLATES["chatml"])
    theirs = marked("{% if thinks %}thinks {% endif %}" + TEMPLATES["chatml"])
    with pytest.warns(UserWarning, match="does not read 'thinks'"):
        (prompt,) = read_prompts(
            CHAT, ours, vocab_size=len(ours), template_options={"thinks": True}
        )
    reward = CausalReward(scorer(theirs), theirs, Texts(ours), None)
    row = reward.encode(prompt, ours("way")["input_ids"])
    assert theirs.decode(row).startswith("thinks ")


def test_a_rendered_chat_that_cannot_be_read_is_warned_about_by_index_and_once() -> None:
    ours = marked(TEMPLATES["chatml"])
    theirs = marked(BRACKETS, num_tokens=330)
    text = ours.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    decoder = tq_fast.TransferDecoder(
        zoo.language_model("llama", vocab_size=len(ours)),
        scorer(theirs),
        tokenizer=ours,
        reward_tokenizer=theirs,
    )
    options = {"k": 2, "horizon": 1, "max_new_tokens": 1}
    with pytest.warns(UserWarning, match=r"prompts\[1\] holds markers .*<\|im_start\|>"):
        decoder.decode(["plain", text + "It"], **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*holds markers")
        decoder.decode(["plain", text, CHAT, text + "It"], **options)


def test_a_chat_that_the_rewards_template_refuses_is_an_error_that_names_the_prompt() -> None:
    ours, theirs = marked(TEMPLATES["chatml"]), marked(TEMPLATES["strict"], num_tokens=330)
    baseline = zoo.language_model("llama", vocab_size=len(ours))
    baseline.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was run"))
    chats = [CHAT, [{"role": "system", "content": "Be short."}, *CHAT]]
    with pytest.raises(InvalidArgument, match=r"prompts\[1\] cannot be rendered.*no system"):
        tq_fast.decode(
            chats,
            baseline,
            scorer(theirs),
            tokenizer=ours,
            reward_tokenizer=theirs,
            max_new_tokens=4,
            horizon=2,
        )


def test_plain_text_starts_and_ends_once() -> None:
    ours = marked(None, adds_start=True, adds_end=True)
    new = ours("yes", add_special_tokens=False)["input_ids"]
    for theirs in (ours, marked(None, adds_start=True, adds_end=True, num_tokens=330)):
        reward = CausalReward(scorer(theirs), theirs, Texts(ours), None)
        for prompt in ("Who? ", "<s>Who? "):
            assert reward.encode(read(prompt, ours), new) == theirs("Who? yes")["input_ids"]


def test_markers_that_are_special_tokens_are_kept_on_demand() -> None:
    ours = marked(TEMPLATES["chatml"], special=("<think>", "</think>"))
    words = "<think>Hm.</think>Yes<|im_end|></s>"
    emitted = ours(words, add_special_tokens=False)["input_ids"]
    assert Texts(ours).response(emitted) == "Hm.Yes"
    assert Texts(ours, keep_special_tokens=True).response(emitted) == "<think>Hm.</think>Yes"
    seen: set[str] = set()

    def reward(prompts: list, responses: list) -> list[float]:
        seen.update(responses)
        return [0.0] * len(responses)

    baseline = zoo.language_model("llama", vocab_size=len(ours))
    think = ours.convert_tokens_to_ids("<think>")
    baseline.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, torch.tensor([think]), 9.0)
    )
    options = RewardOptions(keep_special_tokens=True)
    tq_fast.decode(
        CHAT, baseline, reward, tokenizer=ours, reward_options=options, k=2, max_new_tokens=2
    )
    assert any("<think>" in text for text in seen)


def pair_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = marked(None)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)],
    )
    return tokenizer


def test_a_pair_reads_as_its_tokenizer_joins_it_with_token_types() -> None:
    ours, theirs = marked(TEMPLATES["chatml"]), pair_tokenizer()
    model = encoder(len(theirs))
    reward = EncoderReward(model, theirs, Texts(ours), None, options=RewardOptions(pair=True))
    new = ours(" me")["input_ids"]
    prompts = [read("Who?", ours), read(CHAT, ours)]
    expected = [theirs("Who?", " me"), theirs(CHAT[0]["content"], " me")]
    session = reward.open(Opening(prompts, 2, max_new=4, backend=None))
    with torch.no_grad():
        scores = session.score([0, 1], [new, new])
        for prompt, pair, score in zip(prompts, expected, scores, strict=True):
            assert reward.encode(prompt, new) == pair["input_ids"]
            inputs = {name: torch.tensor([value]) for name, value in pair.items()}
            assert 1 in pair["token_type_ids"]
            assert score == pytest.approx(model(**inputs).logits[0, 0].item(), abs=ATOL)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_is_too_long_is_cut_between_its_special_tokens(side: Any) -> None:
    ours, theirs = marked(None), marked(None, adds_start=True, adds_end=True)
    options = RewardOptions(truncate=side)
    reward = EncoderReward(
        encoder(len(theirs), max_positions=12), theirs, Texts(ours), None, options=options
    )
    whole = theirs("0123456789 abcdefghijklm")["input_ids"]
    row = reward.encode(read("0123456789", ours), ours(" abcdefghijklm")["input_ids"])
    inner = whole[1:-1]
    kept = inner[-10:] if side == "left" else inner[:10]
    assert row == [whole[0], *kept, whole[-1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_pair_that_is_too_long_the_prompt_is_cut_first(side: Any) -> None:
    ours, theirs = marked(None), pair_tokenizer()
    options = RewardOptions(pair=True, truncate=side)
    reward = EncoderReward(
        encoder(len(theirs), max_positions=12), theirs, Texts(ours), None, options=options
    )
    question, answer = theirs("0123456789")["input_ids"][1:-1], theirs("vwxyz")["input_ids"][1:-1]
    room = 12 - 3 - len(answer)
    start, end = theirs.bos_token_id, theirs.eos_token_id
    kept = question[-room:] if side == "left" else question[:room]
    row = reward.encode(read("0123456789", ours), ours("vwxyz")["input_ids"])
    assert row == [start, *kept, end, *answer, end]
    # An answer that is longer than all there is loses its end.
    long = reward.encode(read("0", ours), ours("0123456789" * 2)["input_ids"])
    assert len(long) == 12 and long[-1] == end


def test_an_encoder_without_room_names_the_prompt_and_the_way_out() -> None:
    ours = marked(None)
    theirs = marked(None, adds_start=True, num_tokens=330)
    theirs.model_max_length = 20
    baseline = zoo.language_model("llama", vocab_size=len(ours))
    baseline.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was run"))
    models = {"tokenizer": ours, "reward_tokenizer": theirs, "k": 2, "max_new_tokens": 3}
    with pytest.raises(InvalidArgument, match=r"prompts\[1\] has 20 tokens .*allows 20.*truncate"):
        tq_fast.decode(["0", "0 1 2 3 4 5 6 7 8 9 "], baseline, encoder(len(theirs)), **models)


@pytest.mark.parametrize(
    "wrong", [{"pair": 1}, {"truncate": "middle"}, {"keep_special_tokens": "yes"}]
)
def test_wrong_options_are_refused_by_name(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(InvalidArgument, match=f"reward_options: {name} must be"):
        RewardOptions(**wrong)
    with pytest.raises(InvalidArgument, match="reward_options must be"):
        tq_fast.TransferDecoder(zoo.language_model("llama"), print, reward_options={"pair": True})
