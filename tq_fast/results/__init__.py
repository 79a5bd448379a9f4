"""The results of a decode: responses, traces, certificates and counts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from transformers import PreTrainedTokenizerBase

from .. import device_times
from ..errors import InvalidArgument, TqFastError
from ..prompts import Prompt
from .table import table_of

if TYPE_CHECKING:
    from .trace_figure import TraceFigure

KlKind: TypeAlias = Literal["exact", "at most", "approximate"]


def weakest_kl_kind(kinds: Iterable[KlKind]) -> KlKind:
    """Return what may be said of a mean of divergences of these kinds; "exact" of none."""
    order: tuple[KlKind, ...] = get_args(KlKind)
    return max(kinds, key=order.index, default="exact")


class _ByValue:
    """Dataclasses that hold tensors: equal where every field is, NaN being equal to NaN."""

    def __eq__(self, other: object) -> bool:
        return _is_same(self, other) if type(other) is type(self) else NotImplemented

    # A class that holds lists and tensors has no hash.
    __hash__ = None  # type: ignore[assignment]


def _is_same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return bool(one == other)
    if isinstance(one, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
    if dataclasses.is_dataclass(one):
        names = [field.name for field in dataclasses.fields(one) if field.compare]
        return all(_is_same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other or (one != one and other != other))


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The divergences of one response, and the bound that holds under the prior in use.

    Theorem 1 of arXiv 2405.20495 holds for exact Q and the full vocabulary; truncation to k
    candidates adds `-log(prior mass of the k)` a step, which `kl_bound` contains. Finite roll-outs
    and horizons and imperfect baselines are not covered.

    Attributes:
        kl_to_sft: sum over the steps of KL(pi_alg || pi_sft), nats; None without an SFT model.
            `kl_kind` says what it is to the divergence of the responses' own law. Arg max
            (strategy="greedy") follows no pi_alg: there it describes the law that the tokens are
            the arg max of.
        kl_to_baseline: the same for pi_BL; None where no baseline took part.
        log_prior_mass: sum over the steps of the log prior mass of the k candidates.
        prior: the prior in use, "sft" or "baseline"; "mixture" of both for dera.
        kl_bound: bound on KL(rho_alg || rho_sft) in nats: `T r_max / alpha` under the SFT prior,
            `(1 / beta + T / alpha) r_max` under the baseline prior, `-log_prior_mass` added. None
            where the reward's bounds, or the beta that it needs, were not given, and where it does
            not hold: under the baseline prior for a baseline that was aligned to another reward,
            and for weights="published", whose Q leaves the reward's bounds.
        gap_reduction: the amount, in units of the reward, that the theorem takes off
            `beta KL(rho* || rho_sft)`, its bound on how far the reward stays below the best one:
            `alpha KL(pi_alg || pi_BL)` under the baseline prior, `alpha (KL(pi_alg || pi_sft) -
            KL(pi_BL || pi_sft))` under the SFT prior, summed over the steps. None where the theorem
            says nothing: for indirect transfer, where a model did not take part, and where a
            choice was settled without every Q.
        median_ess: median effective sample size over all steps and candidates with more than one
            roll-out; None where there is none.
        min_ess: the smallest of these sample sizes.
        kl_kind: what the mean of `kl_to_sft` and `kl_to_baseline` over responses is to the
            divergence of the law that the responses come from. "exact": the divergence itself,
            because Q carries no noise or takes no part. "at most": an upper bound, because pi_alg
            is the law given the roll-outs that were drawn, over which the law of the responses
            averages; because bounds on the reward settled choices; or because the best of several
            responses was kept. "approximate": a bound under an assumption that holds roughly.
    """

    kl_to_sft: float | None
    kl_to_baseline: float | None
    log_prior_mass: float
    prior: str
    kl_bound: float | None
    gap_reduction: float | None = None
    median_ess: float | None = None
    min_ess: float | None = None
    kl_kind: KlKind = "exact"


@dataclasses.dataclass(frozen=True, eq=False)
class StepTrace(_ByValue):
    """The record of how one token was chosen. Tensors are on the CPU, log-probs in fp32.

    Attributes:
        candidates: token ids `[k]`, by falling proposal probability.
        rewards: rewards of the roll-outs `[k, n]`; NaN where a candidate has fewer than n, and
            where the choice was settled without one.
        q: values Q `[k]`; NaN for a candidate of which not every roll-out was needed.
        q_stderr: Monte-Carlo standard error of Q `[k]`; NaN with a single roll-out.
        ess: effective sample size of each candidate's weights `[k]`.
        prior_logprobs: log pi_prior `[k]`, under the full vocabulary.
        final_logprobs: log pi_alg `[k]`; NaN unless every Q is known.
        kl_to_sft: KL(pi_alg || pi_sft) of this step, nats; None without an SFT model. Where some Q
            is not known, the greatest value that the bounds on the reward allow.
        kl_to_baseline: KL(pi_alg || pi_BL) of this step, likewise; None where no
            baseline took part.
        choice: index of the chosen candidate.
        kl_baseline_to_sft: KL(pi_BL || pi_sft) of this step over the whole vocabulary, nats; None
            unless both take part.
        value: what a value head says of the text before this token, in units of the reward; None
            without one.
        agents: which of several baselines proposed and rolled out each candidate, int64 `[k]`;
            None where there is one.
    """

    candidates: torch.Tensor
    rewards: torch.Tensor
    q: torch.Tensor
    q_stderr: torch.Tensor
    ess: torch.Tensor
    prior_logprobs: torch.Tensor
    final_logprobs: torch.Tensor
    kl_to_sft: float | None
    kl_to_baseline: float | None
    choice: int
    kl_baseline_to_sft: float | None = None
    value: float | None = None
    agents: torch.Tensor | None = None

    @property
    def num_rollouts(self) -> torch.Tensor:
        """The number of rewards that enter Q of each candidate, int64 `[k]`."""
        return (~self.rewards.isnan()).sum(-1)

    @property
    def token_id(self) -> int:
        """The token that was chosen."""
        return int(self.candidates[self.choice])

    @property
    def is_complete(self) -> bool:
        """Whether every Q is known: the choice was not settled by bounds on the reward."""
        return not bool(self.q.isnan().any())

    @property
    def prior_mass(self) -> float:
        """Prior probability of the k candidates together."""
        return float(self.prior_logprobs.logsumexp(-1).exp())


@dataclasses.dataclass(frozen=True, eq=False)
class StageTrace(_ByValue):
    """The record of one choice between whole texts, or blocks of them.

    Attributes:
        cut: response tokens that all of them begin with.
        rewards: rewards of the K texts that were drawn, fp32 `[K]` on the CPU.
        choice: index of the one that was chosen; None where the text that was there before stayed.
        sequences: their token ids, where they are whole texts (cut is 0); None for others.
    """

    cut: int
    rewards: torch.Tensor
    choice: int | None
    sequences: list[list[int]] | None = None


@dataclasses.dataclass
class Response:
    """One prompt's response in the making: `idx` is the prompt's position in the call."""

    idx: int
    prompt: Prompt
    token_ids: list[int] = dataclasses.field(default_factory=list)
    trace: list[StepTrace] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        """Index of the token that is chosen next, from 0."""
        return len(self.token_ids)


@dataclasses.dataclass
class DecodeStats:
    """Counts of one decode.

    Attributes:
        token_forwards: tokens that went through each model, by role ("baseline", "sft",
            "reward", "baseline_reward"; "reward_states" for the reward model's pass beside the
            prior, where a value head reads it); a reward that is a plain callable counts none.
        num_steps: tokens chosen, over all prompts.
        rollout_steps: forward passes of the baseline for roll-outs, each for all rows.
        rollouts_run: roll-outs that were run.
        rollouts_skipped: roll-outs that were not needed (candidates that end the response, or that
            could not be chosen any more).
        peak_kv_bytes: most bytes of KV held at a time, by role.
        seconds: time by phase ("prefill", "candidates", "rollout", "reward", "reweight",
            "commit"), in seconds. With every model on the CPU, wall time. With models on GPUs, time
            of the GPU: from the moment when it reaches the beginning of the phase in its stream to
            that when it reaches the end, its waiting for the host included; where models are on
            several, of the one that takes longest. Phases of one GPU follow each other, so that
            their sum is the time of the decode. A phase that an exception ends is not counted then.
    """

    token_forwards: dict[str, int] = dataclasses.field(default_factory=dict)
    num_steps: int = 0
    rollout_steps: int = 0
    rollouts_run: int = 0
    rollouts_skipped: int = 0
    peak_kv_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        # Phases that the GPUs may not have ended yet, in their order. It is no field: it is empty
        # in the result of a decode.
        self._intervals: deque[device_times.Interval] = deque()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `seconds[name]`: of GPUs, where a decode times some."""
        begin = device_times.mark()
        if begin:
            yield
            self._intervals.append(device_times.Interval(name, begin, device_times.mark()))
            while self._intervals and self._intervals[0].is_over():
                self._add_first_interval()
            return
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def settle(self) -> None:
        """Wait for the phases that GPUs have not ended yet, and add their times."""
        while self._intervals:
            self._intervals[0].wait()
            self._add_first_interval()

    def _add_first_interval(self) -> None:
        interval = self._intervals.popleft()
        self.seconds[interval.name] = self.seconds.get(interval.name, 0.0) + interval.seconds()

    def add(self, other: DecodeStats) -> None:
        """Add the counts of another forest; of two peaks keep the larger one."""
        for name in ("num_steps", "rollout_steps", "rollouts_run", "rollouts_skipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for role, count in other.token_forwards.items():
            self.token_forwards[role] = self.token_forwards.get(role, 0) + count
        self._intervals += other._intervals
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        for role, num_bytes in other.peak_kv_bytes.items():
            self.peak_kv_bytes[role] = max(self.peak_kv_bytes.get(role, 0), num_bytes)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptResult(_ByValue):
    """The response to one prompt: one entry of every list of `DecodeResult`."""

    text: str | None
    sequence: torch.Tensor
    trace: list[StepTrace]
    certificate: Certificate
    stages: list[StageTrace] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def carry_finished(results: Mapping[int, PromptResult]) -> Iterator[None]:
    """Set `finished`, token ids `[T]` by prompt, on an exception that ends the block."""
    try:
        yield
    except BaseException as error:
        # Any exception can carry the attribute, but only our own declare it.
        vars(error)["finished"] = {idx: result.sequence for idx, result in results.items()}
        raise


def require_index(name: str, value: object, num: int) -> None:
    """Refuse what is no index of `num` entries."""
    if not isinstance(value, int) or isinstance(value, bool) or not -num <= value < num:
        raise InvalidArgument(f"{name} must be an index below {num}, got {value!r}")


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeResult(_ByValue):
    """Responses of one call, in the order of the prompts.

    There is one entry a prompt, or `num_return_sequences` of them in a row. Two results are equal
    where texts, tokens, traces and certificates are; `stats`, which holds times, does not count.

    Attributes:
        texts: responses as text, special tokens left out (`skip_special_tokens`) and the stop
            string too; None where there is no tokenizer.
        sequences: new token ids, int64 `[T]` on the CPU, the EOS token included.
        traces: a `StepTrace` for every token of every response.
        certificates: divergence and bound of every response.
        stats: counts over the whole call.
        stages: choices between whole texts or blocks, of the methods that make some; an empty list
            for a response of another method.
        prompts: the prompt of every response, as rewards see it: text, messages, or token ids where
            there is no tokenizer.
        tokenizer: of the language models, which pictures take the texts of candidates from. It is
            neither saved nor pickled.
    """

    texts: list[str] | None
    sequences: list[torch.Tensor]
    traces: list[list[StepTrace]]
    certificates: list[Certificate]
    stats: DecodeStats = dataclasses.field(compare=False)
    stages: list[list[StageTrace]] = dataclasses.field(default_factory=list)
    prompts: list[Any] = dataclasses.field(default_factory=list, compare=False)
    tokenizer: PreTrainedTokenizerBase | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "tokenizer": None}

    @staticmethod
    def collect(
        results: Sequence[PromptResult],
        stats: DecodeStats,
        *,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> DecodeResult:
        """Return the result of one call from those of its prompts."""
        return DecodeResult(
            texts=None if tokenizer is None else [result.text or "" for result in results],
            sequences=[result.sequence for result in results],
            traces=[result.trace for result in results],
            certificates=[result.certificate for result in results],
            stats=stats,
            stages=[result.stages for result in results],
            prompts=[prompt.given for prompt in prompts],
            tokenizer=tokenizer,
        )

    def plot_trace(self, idx: int = 0, steps: Sequence[int] | None = None) -> TraceFigure:
        """Draw how tokens of response `idx` were chosen, as a figure of matplotlib.

        A panel is a token: its candidates with their Q, in grey what the prior gives each, in blue
        the law that the token was drawn from, and the choice in bold behind a mark. A candidate
        that was not needed, because bounds on the reward settled the choice, has no Q. Without a
        tokenizer (`load` gives none) candidates are token ids.

        Args:
            idx: the position of the response.
            steps: indices of the tokens; None: the six that moved furthest from the prior.

        Raises:
            InvalidArgument: there is no such response or token, or the method chose it without
                candidates, between whole texts.
            TqFastError: matplotlib is not installed (the extra `plots`).
        """
        require_index("idx", idx, len(self.traces))
        trace = self.traces[idx]
        if steps is not None and not len(steps):
            raise InvalidArgument("steps must not be empty; None draws those that moved furthest")
        for step in steps or ():
            require_index("steps", step, len(trace))
        if max((len(step.candidates) for step in trace), default=0) < 2:
            raise InvalidArgument(
                f"response {idx} has no candidates to draw: its method does not choose among "
                "tokens by their Q; `stages` has the choices between texts, where it makes some"
            )
        try:
            from .trace_figure import furthest_steps, trace_figure
        except ModuleNotFoundError as error:
            raise TqFastError(
                "plot_trace needs matplotlib: pip install 'tq-fast[plots]'"
            ) from error
        drawn = [_as_json(step, lambda number: None) for step in trace]
        if self.tokenizer is not None:
            for step in drawn:
                step["texts"] = [self.tokenizer.decode([token]) for token in step["candidates"]]
        title = f"Response {idx}"
        if steps is None and len(trace) > len(shown := furthest_steps(drawn)):
            title += ": the steps that moved furthest from the prior"
        return trace_figure(drawn, title, shown if steps is None else steps, self._before(idx))

    def _before(self, idx: int) -> Callable[[int], str]:
        """The end of a response's text before the token of a step."""
        tokenizer, ids = self.tokenizer, self.sequences[idx].tolist()

        def before(step: int) -> str:
            return "" if tokenizer is None else str(tokenizer.decode(ids[max(0, step - 8) : step]))

        return before

    def _repr_html_(self) -> str:
        return table_of(self)

    def _repr_pretty_(self, printer: Any, is_cycle: bool) -> None:
        """What IPython writes where it shows no HTML; all traces would be pages of numbers."""
        num = len(self.sequences)
        printer.text(f"DecodeResult of {num} {'response' if num == 1 else 'responses'}")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as lists, dicts and numbers, ready for JSON.

        A number that is not finite becomes None; `save` keeps it.
        """
        result: dict[str, Any] = _as_json(self, lambda number: None)
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that `load` reads; numbers that are not finite are texts in it."""
        result = {"format": _FORMAT, **_as_json(self, str)}
        text = json.dumps(result, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> DecodeResult:
        """Return the result that `save` wrote, with equal values and dtypes.

        Raises:
            InvalidArgument: the file holds something else.
            OSError: it cannot be read.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if saved.pop("format") != _FORMAT:
                raise ValueError("another format")
            return DecodeResult(
                texts=saved["texts"],
                sequences=[torch.tensor(ids, dtype=torch.int64) for ids in saved["sequences"]],
                traces=[[_read_step(step) for step in trace] for trace in saved["traces"]],
                certificates=[Certificate(**_numbers(entry)) for entry in saved["certificates"]],
                stats=DecodeStats(**saved["stats"]),
                stages=[[_read_stage(stage) for stage in stages] for stages in saved["stages"]],
                prompts=saved["prompts"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(
                f"{os.fspath(path)!r} must be a file that DecodeResult.save wrote: {error}"
            ) from error


_FORMAT = "tq_fast.DecodeResult 3"
_NOT_FINITE = ("nan", "inf", "-inf")


def _as_json(value: Any, not_finite: Callable[[float], Any]) -> Any:
    """`value` as JSON has it, with `not_finite` of a number that is NaN or infinite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.name != "tokenizer"]
        return {name: _as_json(getattr(value, name), not_finite) for name in names}
    if isinstance(value, torch.Tensor):
        return _as_json(value.tolist(), not_finite)
    if isinstance(value, dict):
        return {name: _as_json(part, not_finite) for name, part in value.items()}
    if isinstance(value, list):
        return [_as_json(part, not_finite) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return not_finite(value)
    return value


def _read_step(saved: dict[str, Any]) -> StepTrace:
    """The step that `_as_json` described."""
    types = {"candidates": torch.int64} | dict.fromkeys(_FLOAT_FIELDS, torch.float32)
    fields: dict[str, Any] = {name: _numbers(value) for name, value in saved.items()}
    if saved["agents"] is not None:
        types["agents"] = torch.int64
    for name, dtype in types.items():
        fields[name] = torch.tensor(fields[name], dtype=dtype)
    return StepTrace(**fields)


def _read_stage(saved: dict[str, Any]) -> StageTrace:
    rewards = torch.tensor(_numbers(saved["rewards"]), dtype=torch.float32)
    return StageTrace(**{**saved, "rewards": rewards})


_FLOAT_FIELDS = ("rewards", "q", "q_stderr", "ess", "prior_logprobs", "final_logprobs")


def _numbers(value: Any) -> Any:
    """`value` with numbers in the place of the texts that stand for those that are not finite."""
    if isinstance(value, dict):
        return {name: _numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_numbers(part) for part in value]
    return float(value) if value in _NOT_FINITE else value
