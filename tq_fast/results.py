"""The results of a decode: responses, traces, certificates and counts."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from .prompts import Prompt


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The divergences of one response, and the bound that holds under the prior in use.

    Theorem 1 of arXiv 2405.20495 holds for exact Q and the full vocabulary; truncation to k
    candidates adds `-log(prior mass of the k)` a step, which `kl_bound` contains. Finite roll-outs
    and horizons and imperfect baselines are not covered.

    Attributes:
        kl_to_sft: sum over the steps of KL(pi_alg || pi_sft), nats; None without an SFT model. An
            upper bound where choices were settled by bounds on the reward.
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
    """

    kl_to_sft: float | None
    kl_to_baseline: float | None
    log_prior_mass: float
    prior: str
    kl_bound: float | None
    gap_reduction: float | None = None
    median_ess: float | None = None
    min_ess: float | None = None


@dataclasses.dataclass(frozen=True)
class StepTrace:
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
            "reward", "baseline_reward"); a reward that is a plain callable counts none.
        num_steps: tokens chosen, over all prompts.
        rollout_steps: forward passes of the baseline for roll-outs, each for all rows.
        rollouts_run: roll-outs that were run.
        rollouts_skipped: roll-outs that were not needed (candidates that end the response, or that
            could not be chosen any more).
        peak_kv_bytes: most bytes of KV held at a time, by role.
        seconds: wall time by phase ("prefill", "candidates", "rollout", "reward", "reweight",
            "commit"), in seconds.
    """

    token_forwards: dict[str, int] = dataclasses.field(default_factory=dict)
    num_steps: int = 0
    rollout_steps: int = 0
    rollouts_run: int = 0
    rollouts_skipped: int = 0
    peak_kv_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to `seconds[name]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def add(self, other: DecodeStats) -> None:
        """Add the counts of another forest; of two peaks keep the larger one."""
        for name in ("num_steps", "rollout_steps", "rollouts_run", "rollouts_skipped"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for role, count in other.token_forwards.items():
            self.token_forwards[role] = self.token_forwards.get(role, 0) + count
        for name, seconds in other.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        for role, num_bytes in other.peak_kv_bytes.items():
            self.peak_kv_bytes[role] = max(self.peak_kv_bytes.get(role, 0), num_bytes)


@dataclasses.dataclass(frozen=True)
class PromptResult:
    """The response to one prompt: one entry of every list of `DecodeResult`."""

    text: str | None
    sequence: torch.Tensor
    trace: list[StepTrace]
    certificate: Certificate


@contextlib.contextmanager
def carry_finished(results: Mapping[int, PromptResult]) -> Iterator[None]:
    """Set `finished`, token ids `[T]` by prompt, on an exception that ends the block."""
    try:
        yield
    except BaseException as error:
        # Any exception can carry the attribute, but only our own declare it.
        vars(error)["finished"] = {idx: result.sequence for idx, result in results.items()}
        raise


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """Responses of one call, one entry a prompt, in the order of the prompts.

    Attributes:
        texts: responses as text, special tokens left out; None where there is no tokenizer.
        sequences: new token ids, int64 `[T]` on the CPU, the EOS token included.
        traces: a `StepTrace` for every token of every response.
        certificates: divergence and bound of every response.
        stats: counts over the whole call.
    """

    texts: list[str] | None
    sequences: list[torch.Tensor]
    traces: list[list[StepTrace]]
    certificates: list[Certificate]
    stats: DecodeStats

    @staticmethod
    def collect(
        results: Sequence[PromptResult], stats: DecodeStats, *, has_texts: bool
    ) -> DecodeResult:
        """Return the result of one call from those of its prompts."""
        return DecodeResult(
            texts=[result.text or "" for result in results] if has_texts else None,
            sequences=[result.sequence for result in results],
            traces=[result.trace for result in results],
            certificates=[result.certificate for result in results],
            stats=stats,
        )
