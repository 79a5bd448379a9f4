"""`tq-fast demo`: the embedded models answer a few prompts, plainly and steered by Transfer Q*.

The output fits a terminal of 80 to 100 columns, or a log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from rich import box
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import presets
from ..config import DecodeConfig
from ..decoder import TransferDecoder
from ..errors import InvalidArgument, TqFastError
from ..evaluation.models import score_responses
from ..models.loading import end_token_ids
from ..models.tiny import TinyWorld, gold_reward, load_tiny_world
from ..prompts import Prompt
from ..results import (
    Certificate,
    DecodeStats,
    KlKind,
    PromptResult,
    StepTrace,
    weakest_kl_kind,
)
from ..transfer.warnings import count_noisy_steps, describe_noise
from .progress import JobProgress
from .terminal import MAX_WIDTH, explain, loading_models, say

_INTRODUCTION = (
    "Tiny models that write reviews of places to eat and to stay. The baseline was aligned to a "
    "reward that likes friendly reviews. Transfer Q* steers it, at decoding time, toward another "
    "one that likes helpful reviews: the aspects that were asked for, figures, and a tip.\n"
)
_NUM_STEPS = 6
_NUM_CANDIDATES = 5
_BAR_WIDTH = 20
_ABOUT_KL: Mapping[KlKind, str] = {
    "exact": "",
    "at most": "at most ",
    "approximate": "approximately at most ",
}


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """Settings of a demo.

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
        """Return the settings of Transfer Q*; the rest is fixed for the embedded models."""
        return DecodeConfig(
            k=self.k,
            alpha=self.alpha,
            num_rollouts=self.num_rollouts,
            horizon=None,
            max_new_tokens=64,
            seed=self.seed,
        )


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """One method's responses, a text and two scores for each prompt."""

    name: str
    texts: list[str]
    rewards: list[float]
    golds: list[float]


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """Everything that a demo shows.

    Attributes:
        prompts: texts.
        methods: SFT, baseline and Transfer Q*, in this order.
        traces: steps of the Transfer Q* responses.
        certificates: of the Transfer Q* responses.
        stats: counts of the Transfer Q* decode.
        seconds: wall time of the Transfer Q* decode.
        tokenizer: of the language models.
    """

    prompts: list[str]
    methods: list[MethodResult]
    traces: list[list[StepTrace]]
    certificates: list[Certificate]
    stats: DecodeStats
    seconds: float
    tokenizer: PreTrainedTokenizerBase


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
    """Keep to one thread: models this small are slower on several, most of all on shared cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def choose_prompts(world: TinyWorld, number: int) -> list[str]:
    """Return the first `number` of the demo's prompts and, after those, of the held-out ones."""
    known = list(dict.fromkeys([*world.demo_prompts, *world.prompts]))
    if not 1 <= number <= len(known):
        raise InvalidArgument(f"prompts must be between 1 and {len(known)}, got {number}")
    return known[:number]


def compare(
    decoder: TransferDecoder, texts: Sequence[str], config: DecodeConfig, console: Console
) -> DemoResult:
    """Decode `texts` by all three methods with one seed, and score the responses."""
    tokenizer = decoder.tokenizer
    assert tokenizer is not None, "the embedded models come with a tokenizer"
    reader = decoder.prompt_reader()
    prompts = [reader.read(idx, text) for idx, text in enumerate(texts)]
    start = time.perf_counter()
    options = {
        "tokenizer": tokenizer,
        "max_new_tokens": config.max_new_tokens,
        "eos_token_id": end_token_ids(decoder.baseline, tokenizer),
        "seed": config.seed,
    }
    # The embedded models are of this process.
    sft, baseline = (cast(PreTrainedModel, model) for model in (decoder.sft, decoder.baseline))
    drawn = {
        "SFT": presets.sft(prompts, sft=sft, **options),
        "baseline": presets.baseline(prompts, baseline, **options),
    }
    took = time.perf_counter() - start
    say(console, f"sampled the SFT and baseline responses in {took:.1f} s")
    say(console, "decoding with Transfer Q*")
    start = time.perf_counter()
    work = dict.fromkeys(range(len(prompts)), config.max_new_tokens)
    progress = JobProgress(console, "prompts", work)

    def hear_token(idx: int) -> None:
        progress.work(1)
        progress.token(idx)

    def hear_finished(idx: int, found: PromptResult) -> None:
        progress.work(config.max_new_tokens - len(found.sequence))
        progress.end(idx)

    with progress, warnings.catch_warnings():
        # The same sentence is printed at the end, under the costs.
        warnings.filterwarnings("ignore", "the standard error of Q")
        decoded = decoder.decode(
            prompts,
            config=config,
            on_token=hear_token,
            on_finished=hear_finished,
        )
    seconds = time.perf_counter() - start
    drawn["Transfer Q*"] = decoded
    return DemoResult(
        prompts=list(texts),
        methods=[
            score(decoder, tokenizer, name, prompts, [ids.tolist() for ids in result.sequences])
            for name, result in drawn.items()
        ],
        traces=decoded.traces,
        certificates=decoded.certificates,
        stats=decoded.stats,
        seconds=seconds,
        tokenizer=tokenizer,
    )


def score(
    decoder: TransferDecoder,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompts: Sequence[Prompt],
    responses: Sequence[Sequence[int]],
) -> MethodResult:
    """Score responses by the reward model and by the exact reward of the embedded world."""
    rewards = score_responses(decoder.reward, prompts, responses)
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    golds = gold_reward([str(prompt.given) for prompt in prompts], texts)
    return MethodResult(name, texts, rewards, golds)


def show_demo(result: DemoResult, config: DecodeConfig, console: Console) -> None:
    """Print responses side by side, scores, what was lost, one trace, and what it took."""
    width = min(MAX_WIDTH, console.width)
    show_responses(result, console, width)
    show_scores(result, console, width)
    for sentence in describe_outcome(result):
        explain(console, sentence)
    show_trace(result, config, console, width)
    show_cost(result, config, console)


def show_responses(result: DemoResult, console: Console, width: int) -> None:
    """Print the responses to each prompt side by side."""
    for idx, prompt in enumerate(result.prompts):
        table = Table(width=width, box=box.ROUNDED, title_justify="left")
        table.title = Text(f"\n{idx + 1}. {prompt}", style="bold")
        for method in result.methods:
            table.add_column(method.name, ratio=1, overflow="fold")
        table.add_row(*(Text(method.texts[idx].strip()) for method in result.methods))
        console.print(table, highlight=False)


def show_scores(result: DemoResult, console: Console, width: int) -> None:
    """Print reward and gold reward of every response, and their means; the best one is marked."""
    table = Table(title="\nScores", box=box.ROUNDED, title_justify="left", title_style="bold")
    table.add_column("prompt", justify="right")
    for method in result.methods:
        table.add_column(f"{method.name}\nreward", justify="right")
    for method in result.methods:
        table.add_column(f"{method.name}\ngold", justify="right")
    for idx in range(len(result.prompts)):
        table.add_row(
            str(idx + 1),
            *_marked([method.rewards[idx] for method in result.methods]),
            *_marked([method.golds[idx] for method in result.methods]),
        )
    table.add_section()
    table.add_row(
        "mean",
        *_marked([statistics.mean(method.rewards) for method in result.methods]),
        *_marked([statistics.mean(method.golds) for method in result.methods]),
        style="bold",
    )
    console.print(table, highlight=False)
    explain(
        console,
        "reward: the reward model that Transfer Q* follows. gold: the exact reward that it was "
        "trained to predict; where only the first one rises, the reward model erred. "
        "*: best of the three.",
    )


def _marked(scores: Sequence[float]) -> list[str]:
    best = max(scores)
    return [f"{score:.2f}{'*' if score == best else ' '}" for score in scores]


def describe_outcome(result: DemoResult) -> list[str]:
    """Say where Transfer Q* lost, by either score, and against which method."""
    steered = result.methods[-1]
    sentences = []
    for label, kind in (("reward", "rewards"), ("gold reward", "golds")):
        ours = getattr(steered, kind)
        lost = []
        for other in result.methods[:-1]:
            theirs = getattr(other, kind)
            pairs = zip(ours, theirs, strict=True)
            places = [str(idx + 1) for idx, (a, b) in enumerate(pairs) if a < b]
            if places:
                word = "prompt" if len(places) == 1 else "prompts"
                text = f"to {other.name} on {word} {', '.join(places)}"
                is_mean_lost = statistics.mean(ours) < statistics.mean(theirs)
                lost.append(text + (" and on the mean" if is_mean_lost else ""))
        where = "; ".join(lost) or "on no prompt"
        sentences.append(f"By {label}, Transfer Q* lost {where}.")
    return sentences


def show_trace(
    result: DemoResult, config: DecodeConfig, console: Console, width: int, idx: int = 0
) -> None:
    """Print the steps of one response at which the reward moved the choice most."""
    trace = result.traces[idx]
    shown = pick_steps(trace)
    bar = "#" if console.options.ascii_only else "\u2588"
    prior = result.certificates[idx].prior
    console.print()
    console.print(Rule(f"How response {idx + 1} was chosen", style="bold"), width=width)
    explain(
        console,
        f"The {len(shown)} of its {len(trace)} steps at which Q moved the law most, and the "
        f"{min(_NUM_CANDIDATES, config.k)} likeliest of {config.k} candidates. final is "
        f"proportional to prior x exp(Q / {config.alpha:g}); prior is the {prior} model; "
        "> is the token that was drawn.",
    )
    for step in shown:
        before = [trace[i].token_id for i in range(step)]
        text = result.tokenizer.decode(before, skip_special_tokens=True)
        context = f"...{text[-56:]}" if len(text) > 60 else text or "(start of the response)"
        say(console, f"\nstep {step + 1}, after: {context}")
        console.print(_step_table(trace[step], result.tokenizer, bar), highlight=False)


def pick_steps(trace: Sequence[StepTrace]) -> list[int]:
    """Return the steps whose final law is farthest from the prior's on the candidates, in order."""
    order = sorted(range(len(trace)), key=lambda step: -_shift(trace[step]))
    return sorted(order[:_NUM_STEPS])


def _shift(step: StepTrace) -> float:
    """Return the KL of the final law from the prior, both on the candidates alone."""
    prior = step.prior_logprobs.log_softmax(-1)
    final = step.final_logprobs
    return float((final.exp() * (final - prior)).nansum())


def _step_table(step: StepTrace, tokenizer: PreTrainedTokenizerBase, bar: str) -> Table:
    order = step.final_logprobs.argsort(descending=True, stable=True).tolist()
    shown = order[:_NUM_CANDIDATES]
    if step.choice not in shown:
        shown[-1] = step.choice
    table = Table(box=None, padding=(0, 1), show_edge=False)
    table.add_column("")
    table.add_column("candidate", min_width=16, no_wrap=True)
    table.add_column("prior", justify="right")
    table.add_column("Q", justify="right", min_width=6)
    table.add_column("final", justify="right")
    table.add_column("")
    for candidate in shown:
        is_choice = candidate == step.choice
        prior = float(step.prior_logprobs[candidate].exp())
        final = float(step.final_logprobs[candidate].exp())
        text = tokenizer.decode([int(step.candidates[candidate])])
        table.add_row(
            ">" if is_choice else "",
            Text(json.dumps(text, ensure_ascii=False)),
            f"{prior:.1%}",
            f"{float(step.q[candidate]):.2f}",
            f"{final:.1%}",
            bar * round(final * _BAR_WIDTH),
            style="bold" if is_choice else None,
        )
    return table


def show_cost(result: DemoResult, config: DecodeConfig, console: Console) -> None:
    """Print what Transfer Q* took, and how far it went from the models."""
    stats = result.stats
    rate = stats.num_steps / result.seconds
    per_token = stats.rollouts_run / max(1, stats.num_steps)
    kls = [found.kl_to_sft for found in result.certificates if found.kl_to_sft is not None]
    kl = statistics.mean(kls)
    kind = weakest_kl_kind(found.kl_kind for found in result.certificates)
    explain(
        console,
        f"\n{stats.num_steps} tokens in {result.seconds:.1f} s ({rate:.1f} a second), "
        f"{per_token:.1f} roll-outs a token; mean KL from SFT {_ABOUT_KL[kind]}{kl:.1f} nats a "
        "response.",
    )
    explain(
        console,
        f"k={config.k}, alpha={config.alpha:g}, n={config.num_rollouts}, seed={config.seed}; "
        "every draw is seeded: the same command gives the same responses.",
    )
    noisy = sum(count_noisy_steps(trace, config.alpha) for trace in result.traces)
    if noisy:
        explain(console, f"warning: {describe_noise(noisy, stats.num_steps, config.alpha)}")
