"""`tq-fast demo`: the embedded models answer a few prompts, plainly and steered by Transfer Q*."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console

from .. import presets
from ..config import DecodeConfig
from ..decoder import TransferDecoder
from ..errors import InvalidArgument, TqFastError
from ..models.loading import end_token_ids
from ..models.tiny import TinyWorld, gold_reward, load_tiny_world
from ..prompts import Prompt
from ..rewards.base import Opening
from .demo_view import DemoResult, MethodResult, show_demo
from .job_progress import JobProgress
from .terminal import explain, loading_models, say

_INTRODUCTION = (
    "Tiny models that write reviews of places to eat and to stay. The baseline was aligned to a "
    "reward that likes friendly reviews. Transfer Q* steers it, at decoding time, toward another "
    "one that likes helpful reviews: the aspects that were asked for, figures, and a tip.\n"
)


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """What a demo may change.

    Attributes:
        seed: of every random draw.
        num_prompts: prompts to answer.
        k: candidates per step.
        alpha: decoding temperature, in units of the reward.
        num_rollouts: roll-outs per candidate.
    """

    seed: int = 0
    num_prompts: int = 4
    k: int = 10
    alpha: float = 0.5
    num_rollouts: int = 8

    def config(self) -> DecodeConfig:
        """The settings of Transfer Q*; the rest is fixed for the embedded models."""
        return DecodeConfig(
            k=self.k,
            alpha=self.alpha,
            num_rollouts=self.num_rollouts,
            horizon=None,
            max_new_tokens=64,
            seed=self.seed,
        )


def run_demo(options: DemoOptions, console: Console) -> DemoResult:
    """Run the demo and print it.

    Raises:
        InvalidArgument: an option is out of its range.
        TqFastError: the embedded models are not there.
    """
    config = options.config()
    try:
        world = load_tiny_world()
    except FileNotFoundError as error:
        raise TqFastError(str(error)) from error
    texts = choose_prompts(world, options.num_prompts)
    explain(console, _INTRODUCTION)
    with loading_models(console):
        decoder = TransferDecoder(world.baseline, world.reward, sft=world.sft, device="cpu")
    with _one_thread():
        result = compare(decoder, texts, config, console)
    show_demo(result, config, console)
    return result


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, much slower where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_prompts(world: TinyWorld, number: int) -> list[str]:
    """The first `number` of the demo's prompts and, after those, of the held-out ones."""
    known = list(dict.fromkeys([*world.demo_prompts, *world.prompts]))
    if not 1 <= number <= len(known):
        raise InvalidArgument(f"prompts must be between 1 and {len(known)}, got {number}")
    return known[:number]


def compare(
    decoder: TransferDecoder, texts: Sequence[str], config: DecodeConfig, console: Console
) -> DemoResult:
    """Decode `texts` by all three methods with one seed and score what comes out."""
    reader = decoder.prompt_reader()
    prompts = [reader.read(idx, text) for idx, text in enumerate(texts)]
    start = time.perf_counter()
    options = {
        "tokenizer": decoder.tokenizer,
        "max_new_tokens": config.max_new_tokens,
        "eos_token_id": end_token_ids(decoder.baseline, decoder.tokenizer),
        "seed": config.seed,
    }
    drawn = {
        "SFT": presets.sft(prompts, sft=decoder.sft, **options),
        "baseline": presets.baseline(prompts, decoder.baseline, **options),
    }
    took = time.perf_counter() - start
    say(console, f"sampled the SFT and baseline responses in {took:.1f} s")
    say(console, "decoding with Transfer Q*")
    start = time.perf_counter()
    progress = JobProgress(
        console, num_pending=len(prompts), num_before=0, max_new_tokens=config.max_new_tokens
    )
    with progress, warnings.catch_warnings():
        # The view says it, in its own place.
        warnings.filterwarnings("ignore", "the standard error of Q")
        decoded = decoder.decode(
            prompts,
            config=config,
            on_token=progress.token,
            on_finished=lambda idx, _: progress.end(idx, is_failed=False),
        )
    seconds = time.perf_counter() - start
    drawn["Transfer Q*"] = decoded
    return DemoResult(
        prompts=list(texts),
        methods=[
            score(decoder, name, prompts, [ids.tolist() for ids in result.sequences])
            for name, result in drawn.items()
        ],
        traces=decoded.traces,
        certificates=decoded.certificates,
        stats=decoded.stats,
        seconds=seconds,
        tokenizer=decoder.tokenizer,
    )


def score(
    decoder: TransferDecoder,
    name: str,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[int]],
) -> MethodResult:
    """Score responses by the reward model and by the exact reward of the embedded world."""
    session = decoder.reward.open(
        Opening(prompts, len(prompts), max_new=max(map(len, responses)), backend=None)
    )
    with torch.no_grad():
        rewards = session.score(range(len(prompts)), responses)
    texts = [decoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    golds = gold_reward([prompt.given for prompt in prompts], texts)
    return MethodResult(name, texts, rewards, golds)
