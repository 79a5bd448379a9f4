"""Account for the time of a decode, beside the least that the machine allows.

    python -m bench.account [--dtype bf16] [--prompt 512] [--k 10] [--rollouts 1] [--horizon 20]

The account counts weights, KV, FLOPs and token-forwards per emitted token of the naive loop, of
ours and of the least possible; it measures, in the same run, how fast the machine reads memory and
multiplies; and it gives, phase by phase, the least time as a share of the time that was taken.

In the least time of a phase every pass reads the weights once and the KV that it attends to once,
or computes its FLOPs, whichever takes longer at the measured rates.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import transformers
from torch import nn

import tq_fast
from bench.ceilings import Machine, Work, measure_machine
from bench.decode_models import DTYPES, Duo, prompt_of, random_duo
from tq_fast.engines import local
from tq_fast.forest.language import LanguageForest
from tq_fast.rollouts.state import RolloutSampler

_ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Setting:
    """The decode that is measured: one prompt, k candidates, n roll-outs of L tokens each."""

    dtype: str
    prompt: int
    k: int
    num_rollouts: int
    horizon: int
    tokens: int

    @property
    def num_branches(self) -> int:
        return self.k * self.num_rollouts


@dataclasses.dataclass(frozen=True)
class Model:
    """The bytes and FLOPs of a forward pass of a model.

    Attributes:
        weight_bytes: bytes of all weights that every pass multiplies by.
        body_flops: FLOPs of one token, without attention and the output layer (LM head or score).
        head_flops: FLOPs of one token through the output layer.
        kv_bytes: bytes of the keys and values of one token.
        attention_flops: FLOPs of one token for each token that it attends to.
    """

    weight_bytes: int
    body_flops: int
    head_flops: int
    kv_bytes: int
    attention_flops: int


def describe_model(model: nn.Module) -> Model:
    """Count the linear layers of a Llama shape; its embedding table costs no product."""
    config = model.config
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    roots = {name for name in linear if name in ("lm_head", "score")}
    size = config.hidden_size
    itemsize = next(model.parameters()).element_size()
    return Model(
        weight_bytes=sum(layer.weight.nbytes for layer in linear.values()),
        body_flops=sum(2 * m.weight.numel() for name, m in linear.items() if name not in roots),
        head_flops=sum(2 * linear[name].weight.numel() for name in roots),
        kv_bytes=2 * config.num_hidden_layers * size * itemsize,
        attention_flops=4 * config.num_hidden_layers * size,
    )


def naive_token_forwards(setting: Setting) -> dict[str, int]:
    """Return the tokens through each model for the first token that the naive loop emits.

    The baseline reads the context for the candidates; for every roll-out `generate` encodes context
    and candidate and then one token a step. The reward reads every whole text.
    """
    rollout = setting.prompt + 1 + setting.horizon
    return {
        "baseline": setting.prompt + setting.num_branches * (rollout - 1),
        "reward": setting.num_branches * rollout,
    }


def least_token_forwards(setting: Setting) -> dict[str, int]:
    """Return the least tokens through each model for one emitted token.

    The baseline reads the candidates and every roll-out token but the last once, the reward all.
    """
    rollouts = setting.num_branches * (setting.horizon - 1)
    return {
        "baseline": setting.k + rollouts,
        "reward": setting.k + setting.num_branches * setting.horizon,
    }


def least_work(setting: Setting, baseline: Model, reward: Model) -> dict[str, Work]:
    """Return the least work of each phase, per emitted token."""
    rollout_tokens = least_token_forwards(setting)["baseline"]
    scored = least_token_forwards(setting)["reward"]
    # A pass reads the prefix once, whatever the number of roll-outs, and of each roll-out half of
    # its length on average.
    context = setting.prompt + setting.num_branches * setting.horizon / 2
    attended = setting.prompt + setting.horizon / 2
    return {
        "rollout": Work(
            setting.horizon * (baseline.weight_bytes + baseline.kv_bytes * context),
            rollout_tokens
            * (baseline.body_flops + baseline.head_flops + baseline.attention_flops * attended),
        ),
        "reward": Work(
            reward.weight_bytes + reward.kv_bytes * setting.prompt,
            scored * (reward.body_flops + reward.attention_flops * attended),
        ),
        "prefill": Work(
            baseline.weight_bytes + reward.weight_bytes,
            setting.prompt
            * (baseline.body_flops + reward.body_flops + baseline.attention_flops * setting.prompt),
        ),
    }


@contextlib.contextmanager
def _timed(owner: object, name: str, seconds: dict[str, float], key: str) -> Iterator[None]:
    function = getattr(owner, name)

    def wrapper(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, function)


def measure_phases(
    duo: Duo, setting: Setting
) -> tuple[dict[str, float], tq_fast.DecodeResult, dict[str, float]]:
    """Return the seconds of each phase per emitted token, the decode, and its seconds by op.

    The seconds of the prefill are those of both models for the whole decode.
    """
    decoder = tq_fast.TransferDecoder(duo.baseline, duo.reward)
    options = {
        "k": setting.k,
        "num_rollouts": setting.num_rollouts,
        "horizon": setting.horizon,
        "rollout": "greedy" if setting.num_rollouts == 1 else "sample",
        "strategy": "greedy",
        "eos_token_id": (),
        "backend": None,
    }
    prompt = prompt_of(setting.prompt)

    def run(tokens: int) -> tuple[dict[str, float], tq_fast.DecodeResult]:
        inner: dict[str, float] = {}
        with (
            _timed(LanguageForest, "forward_rows", inner, "rollout forward"),
            _timed(RolloutSampler, "advance", inner, "sampling"),
            _timed(local, "run_rollouts", inner, "rollout"),
        ):
            result = decoder.decode(prompt, max_new_tokens=tokens, **options)
        phases = dict(result.stats.seconds)
        phases["rollout forward"] = inner["rollout forward"]
        phases["sampling"] = inner["sampling"]
        phases["roll-out rest"] = (
            phases.pop("rollout") - phases["rollout forward"] - phases["sampling"]
        )
        return phases, result

    run(1)
    first, whole = [], []
    for _ in range(_ROUNDS):
        first.append(run(1)[0])
        phases, result = run(1 + setting.tokens)
        whole.append(phases)

    def median(rounds: list[dict[str, float]], name: str) -> float:
        return statistics.median(phases[name] for phases in rounds)

    # In the difference of two lengths prefill and the reward's first pass over the prompt cancel.
    token = {
        name: (median(whole, name) - median(first, name)) / setting.tokens for name in whole[0]
    }
    token["prefill"] = median(first, "prefill") + median(first, "reward") - token["reward"]
    return token, result, _kernel_seconds(lambda: run(1 + setting.tokens))


def _kernel_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Return the self time of every op in one profiled decode, seconds, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    times = {
        event.key: event.self_cpu_time_total / 1e6
        for event in profile.key_averages()
        if event.self_cpu_time_total
    }
    return dict(sorted(times.items(), key=lambda item: -item[1]))


@torch.inference_mode()
def measure_pass(duo: Duo, setting: Setting) -> dict[str, float]:
    """Return the seconds of one pass of the roll-outs as it is, and of its ops layer by layer."""
    forest = LanguageForest(
        duo.baseline,
        num_trees=1,
        num_rows=setting.num_branches,
        prefix_capacity=setting.prompt,
        branch_capacity=setting.horizon,
        backend=None,
    )
    forest.begin(1)
    forest.encode([0], [prompt_of(setting.prompt).tolist()])
    tree = torch.zeros(setting.num_branches, dtype=torch.int64)
    tokens = torch.arange(setting.num_branches)

    def run() -> list[float]:
        seconds = []
        for depth in range(setting.horizon):
            start = time.perf_counter()
            forest.forward_rows(tokens, start=depth, tree=tree)
            seconds.append(time.perf_counter() - start)
        return seconds

    run()
    whole = statistics.median(run() + run())
    # Without what stands in for the backbone, its layers are calls of their own.
    vars(forest.model.base_model).pop("forward", None)
    run()
    ops = _kernel_seconds(run)
    return {"whole": whole} | {name: ops[name] / setting.horizon for name in ops}


def report(setting: Setting, duo: Duo) -> list[str]:
    """Return the account as lines of text."""
    dtype = DTYPES[setting.dtype]
    machine = measure_machine(dtype)
    baseline, reward = describe_model(duo.baseline), describe_model(duo.reward)
    token, result, kernels = measure_phases(duo, setting)
    lines = [
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, tq_fast "
        f"{tq_fast.__version__}",
        f"memory {machine.bytes_per_second / 1e9:.1f} GB/s, {setting.dtype} products "
        f"{machine.flops_per_second / 1e9:.0f} GFLOP/s (measured in this run)",
        f"{setting.dtype}, prompt {setting.prompt}, k {setting.k}, n {setting.num_rollouts}, "
        f"L {setting.horizon}; weights {baseline.weight_bytes / 1e6:.0f} MB a baseline pass, "
        f"{reward.weight_bytes / 1e6:.0f} MB a reward pass; KV {baseline.kv_bytes / 1e3:.0f} kB "
        "a token",
        "",
        *_count_lines(setting, baseline, reward, result),
        "",
        *_phase_lines(token, least_work(setting, baseline, reward), machine),
        "",
        *_pass_lines(measure_pass(duo, setting), setting, baseline),
        "",
        *_kernel_lines(kernels, result),
    ]
    return lines


def _count_lines(
    setting: Setting, baseline: Model, reward: Model, result: tq_fast.DecodeResult
) -> list[str]:
    stats = result.stats
    # Ours encodes the prompt once, which is left out; the naive loop does so for every token.
    ours = {
        role: (count - setting.prompt) / stats.num_steps
        for role, count in stats.token_forwards.items()
    }
    columns = {
        "naive loop": naive_token_forwards(setting),
        "ours": ours,
        "least": least_token_forwards(setting),
    }
    lines = ["per emitted token      naive loop         ours        least"]
    for role in ("baseline", "reward"):
        cells = "".join(f"{column[role]:13.0f}" for column in columns.values())
        lines.append(f"{role + ' tokens':20}{cells}")
    attended = setting.prompt + setting.horizon / 2
    flops = [
        column["baseline"]
        * (baseline.body_flops + baseline.head_flops + baseline.attention_flops * attended)
        + column["reward"] * (reward.body_flops + reward.attention_flops * attended)
        for column in columns.values()
    ]
    lines.append(f"{'GFLOPs (about)':20}" + "".join(f"{count / 1e9:13.0f}" for count in flops))
    passes = setting.horizon * baseline.weight_bytes + reward.weight_bytes
    naive = (setting.horizon + 1) * baseline.weight_bytes + reward.weight_bytes
    weights = f"{naive / 1e9:13.2f}{passes / 1e9:13.2f}{passes / 1e9:13.2f}"
    return [*lines, f"{'GB of weights':20}{weights}"]


def _phase_lines(token: dict[str, float], least: dict[str, Work], machine: Machine) -> list[str]:
    floors = {name: work.seconds(machine) for name, work in least.items()}
    floors["rollout forward"] = floors.pop("rollout")
    lines = ["phase (a token)             ms     least ms     share of the least"]
    order = ("candidates", "rollout forward", "sampling", "roll-out rest", "reward")
    for name in (*order, "reweight", "commit"):
        lines.append(_phase_line(name, token[name], floors.get(name)))
    names = [name for name in token if name != "prefill"]
    total = sum(token[name] for name in names)
    least_total = floors["rollout forward"] + floors["reward"]
    lines.append(_phase_line("all", total, least_total))
    return [*lines, _phase_line("prefill (once)", token["prefill"], floors["prefill"])]


def _phase_line(name: str, seconds: float, floor: float | None) -> str:
    line = f"{name:20}{1e3 * seconds:10.2f}"
    if floor is not None:
        line += f"{1e3 * floor:13.2f}{100 * floor / seconds:12.0f} %"
    return line


def _pass_lines(seconds: dict[str, float], setting: Setting, baseline: Model) -> list[str]:
    """What a pass reads in each of its parts, and how fast.

    In one call threads start once, and read ahead from one part into the next, which the parts
    alone do not: their sum may be more than the whole, which holds small ops and Python, too.
    """
    itemsize = DTYPES[setting.dtype].itemsize
    head = baseline.head_flops // 2 * itemsize
    context = setting.prompt + setting.num_branches * setting.horizon // 2
    parts = {
        "layers, without attention": (
            ("project_qkv", "finish_decoder_layer"),
            baseline.weight_bytes - head,
        ),
        "LM head": (("few_rows_linear",), head),
        "attention": (("shared_prefix_attention",), baseline.kv_bytes * context),
    }
    title = f"a pass of {setting.num_branches} rows"
    lines = [f"{title:27}       MB        ms      GB/s   (each op alone, by the profiler)"]
    for name, (ops, num_bytes) in parts.items():
        taken = sum(seconds.get(f"tq_fast::{op}", 0.0) for op in ops)
        speed = f"{num_bytes / taken / 1e9:10.1f}" if taken else ""
        lines.append(f"{name:27}{num_bytes / 1e6:9.1f}{1e3 * taken:10.2f}{speed}")
    return [*lines, f"{'all, in one call':36}{1e3 * seconds['whole']:10.2f}"]


def _kernel_lines(kernels: dict[str, float], result: tq_fast.DecodeResult) -> list[str]:
    whole = sum(kernels.values())
    wall = sum(result.stats.seconds.values())
    lines = [
        f"self time of ops in one profiled decode of {result.stats.num_steps} tokens, prefill "
        f"included: {whole:.2f} s, of {wall:.2f} s without the profiler; the rest is Python and "
        "dispatch"
    ]
    for name, seconds in list(kernels.items())[:14]:
        lines.append(f"  {name:48}{1e3 * seconds:9.1f} ms{100 * seconds / whole:6.1f} %")
    return lines


def main() -> None:
    """Parse the setting and print its account."""
    parser = argparse.ArgumentParser(prog="bench.account", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    for name, value in (("prompt", 512), ("k", 10), ("rollouts", 1), ("horizon", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, default=4, help="emitted tokens that are timed")
    args = parser.parse_args()
    setting = Setting(args.dtype, args.prompt, args.k, args.rollouts, args.horizon, args.tokens)
    duo = random_duo()
    if args.dtype != "fp32":
        duo = duo.to(DTYPES[args.dtype])
    print("\n".join(report(setting, duo)))


if __name__ == "__main__":
    main()
