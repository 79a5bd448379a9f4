"""A value-guided token against a plain sampled one of ours, and against `generate`, in one run.

The model is the random-weight Llama shape of 134 M parameters of `bench/decode_models.py`, the head
has random weights (256-256, rank 64), prompts have 128 tokens, and no token ends a sequence. The
time per token is that of 65 tokens less that of one, over 64: it leaves out the prompt and what a
call costs by itself. The three run in turns, and ratios are those of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LlamaForCausalLM

from bench.decode_models import DTYPES, Duo, prompt_of, random_duo
from tq_fast import DecodeConfig
from tq_fast.presets import open_method
from tq_fast.values.head import ValueHead, ValueHeadConfig

LENGTH = 128
TOKENS = 64
ROUNDS = 5
PROVIDERS = ("value_guided", "sft", "generate")


@pytest.fixture(scope="module")
def fp32_duo() -> Duo:
    return random_duo()


def random_head(model: LlamaForCausalLM) -> ValueHead:
    """A head whose directions move log-probs by about one nat."""
    torch.manual_seed(1)
    head = ValueHead(ValueHeadConfig(model.config.hidden_size, model.config.vocab_size))
    torch.nn.init.normal_(head.token_embeddings)
    return head.eval().requires_grad_(False)


def calls(
    model: LlamaForCausalLM, prompts: list[torch.Tensor]
) -> dict[str, Callable[[int], list[list[int]]]]:
    """Return, for each provider, a function that decodes so many tokens of every prompt."""
    head = random_head(model)
    together = torch.stack(prompts)

    def ours(name: str, **own: object) -> Callable[[int], list[list[int]]]:
        methods = {
            num: open_method(
                name,
                sft=model,
                config=DecodeConfig(max_new_tokens=num, eos_token_id=(), alpha=1.0),
                **own,
            )
            for num in (1, TOKENS + 1)
        }
        return lambda num: [ids.tolist() for ids in methods[num].decode(prompts).sequences]

    @torch.inference_mode()
    def generate(num: int) -> list[list[int]]:
        found = model.generate(
            together,
            attention_mask=torch.ones_like(together),
            do_sample=True,
            max_new_tokens=num,
            min_new_tokens=num,
            top_k=0,
            pad_token_id=0,
        )
        return found[:, together.shape[1] :].tolist()

    return {
        "value_guided": ours("value_guided", value=head),
        "sft": ours("sft"),
        "generate": generate,
    }


@pytest.mark.parametrize("num_prompts", [1, 8])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_value_guided_token(
    benchmark: BenchmarkFixture, fp32_duo: Duo, dtype: str, num_prompts: int
) -> None:
    model = fp32_duo.baseline if dtype == "fp32" else fp32_duo.to(DTYPES[dtype]).baseline
    prompts = [prompt_of(LENGTH + i)[:LENGTH] for i in range(num_prompts)]
    providers = calls(model, prompts)
    for name in PROVIDERS:
        found = providers[name](TOKENS + 1)
        assert [len(ids) for ids in found] == [TOKENS + 1] * num_prompts, name
    seconds: dict[str, list[float]] = {name: [] for name in PROVIDERS}

    def round_of_all() -> None:
        for name in PROVIDERS:
            marks = [time.perf_counter()]
            for num in (1, TOKENS + 1):
                providers[name](num)
                marks.append(time.perf_counter())
            seconds[name].append((marks[2] - 2 * marks[1] + marks[0]) / TOKENS)

    benchmark.pedantic(round_of_all, rounds=ROUNDS, warmup_rounds=1)
    per_token = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    benchmark.group = f"{dtype}, {num_prompts} prompts"
    for name, found in per_token.items():
        benchmark.extra_info[f"{name} ms a token"] = round(1e3 * found, 3)
    ratios = {
        "value_guided over sft": per_token["value_guided"] / per_token["sft"],
        "value_guided over generate": per_token["value_guided"] / per_token["generate"],
    }
    for name, ratio in ratios.items():
        benchmark.extra_info[name] = round(ratio, 3)
    print(f"\n{benchmark.group}: {benchmark.extra_info}")
