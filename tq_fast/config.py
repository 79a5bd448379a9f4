"""`DecodeConfig`, every setting of a decode, checked when it is made; `SpeedOptions`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal, TypedDict, TypeGuard

from .errors import InvalidArgument, nearest

Strategy = Literal["sample", "greedy"]
Rollout = Literal["sample", "greedy"]
Role = Literal["sft", "baseline"]
Transfer = Literal["direct", "indirect"]
Weights = Literal["log_ratio", "reward_gap", "published"]
Estimator = Literal["mean", "soft"]
Backend = Literal["auto", "cuda", "triton", "cpu", "ref"]

# Names that other libraries have for a field, or the place where they have it.
_ELSEWHERE = {
    "chat_template": "template_options",
    "chat_template_kwargs": "template_options",
    "continue_final_message": "template_options",
    "do_sample": "strategy",
    "documents": "template_options",
    "enable_thinking": "template_options",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_length": "min_new_tokens",
    "min_tokens": "min_new_tokens",
    "n": "num_return_sequences",
    "stop_strings": "stop",
    "temperature": "rollout_temperature",
    "tools": "template_options",
    "top_k": "rollout_top_k",
    "top_p": "rollout_top_p",
}

# Beyond these, rewards or logits of ordinary size that are divided by a scale leave fp32.
_SCALES = (1e-30, 1e30)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Settings of Transfer Q* decoding (arXiv 2405.20495, Algorithm 1).

    Attributes:
        k: candidates per step, the k largest of the proposing policy.
        alpha: decoding temperature, in units of the reward; small follows the reward.
        beta: KL weight that the baseline was trained with, in units of the reward. Needed for
            indirect transfer, and for the certificate's bound under the baseline prior.
        num_rollouts: roll-outs per candidate (n). Greedy roll-outs are all the same, so one runs.
        horizon: tokens per roll-out (L) after the candidate; 0 scores the partial text; None
            rolls out until the response would reach `max_new_tokens`.
        max_new_tokens: response length (T), the EOS token included.
        min_new_tokens: no EOS is chosen before the response has this many tokens; the next
            likeliest token is a candidate in its place. Roll-outs keep to the model's own law, and
            a stop string ends a response all the same.
        stop: a string or several that end the response as soon as its text holds one: the text
            ends before it, the token sequence with the token that completed it. A reward scores a
            roll-out up to there, the token included in which the string begins; roll-outs are
            drawn to their horizon all the same, so that a stop string saves no time there.
        strategy: how the next token is chosen from pi_alg.
        rollout: how roll-outs are drawn: from the baseline's law (the paper's expectation) or
            by arg max (the published code).
        rollout_temperature: temperature of sampled roll-outs.
        rollout_top_k: keep this many tokens in sampled roll-outs; 0 keeps all. Before top-p.
        rollout_top_p: keep the smallest set of at least this mass; 1.0 keeps all.
        prior: the policy that is reweighted; None: "sft" when an SFT model is given, else
            "baseline".
        candidates_from: the policy that proposes the candidates.
        transfer: "direct" (the baseline was aligned to the target reward) or "indirect".
        weights: how indirect transfer weighs its roll-outs: "log_ratio" by
            r / beta + log pi_sft - log of the density drawn from (sampled roll-outs only),
            "reward_gap" by (r - r_BL) / beta, both normalised within a candidate, so that more
            than one roll-out is needed; "published" as the paper's code does, for comparison.
        estimator: "mean" of the weighed rewards, or "soft", alpha log mean exp(r / alpha).
        eos_token_id: ids that end a response; None: the baseline's own; (): never stop.
        num_return_sequences: responses to each prompt, each with a random stream of its own; they
            are listed prompt by prompt. Where nothing is sampled they are all the same.
        skip_special_tokens: whether special tokens are left out of result texts; False keeps all of
            them, an EOS too. What a reward reads is settled by `RewardOptions`.
        seed: of every random draw; the same seed gives the same responses.
        backend: the one backend that every op must use; None: TQ_FAST_BACKEND, else "auto", the
            first of cuda, triton, cpu and ref that accepts the inputs.

    Raises:
        InvalidArgument: a value is out of its range; the message names field and value.
    """

    k: int = 10
    alpha: float = 1.0
    beta: float | None = None
    num_rollouts: int = 1
    horizon: int | None = 20
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop: str | Sequence[str] = ()
    strategy: Strategy = "sample"
    rollout: Rollout = "sample"
    rollout_temperature: float = 1.0
    rollout_top_k: int = 0
    rollout_top_p: float = 1.0
    prior: Role | None = None
    candidates_from: Role = "baseline"
    transfer: Transfer = "direct"
    weights: Weights = "log_ratio"
    estimator: Estimator = "mean"
    eos_token_id: int | tuple[int, ...] | None = None
    num_return_sequences: int = 1
    skip_special_tokens: bool = True
    seed: int = 0
    backend: Backend | None = None

    def __post_init__(self) -> None:
        for name in ("k", "num_rollouts", "max_new_tokens", "num_return_sequences"):
            require_int(name, getattr(self, name), low=1)
        self._check_response()
        if self.horizon is not None:
            require_int("horizon", self.horizon, low=0)
        require_int("rollout_top_k", self.rollout_top_k, low=0)
        if not _is_int(self.seed) or not -(2**63) <= self.seed < 2**64:
            raise InvalidArgument(f"seed must be an integer of 64 bits, got {self.seed!r}")
        for name in ("alpha", "rollout_temperature"):
            require_positive(name, getattr(self, name))
        if self.beta is not None:
            require_positive("beta", self.beta)
        top_p = self.rollout_top_p
        if not is_real(top_p) or not 0.0 < top_p <= 1.0:
            raise InvalidArgument(f"rollout_top_p must be in (0, 1], got {top_p!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                expected = ", ".join(repr(choice) for choice in choices)
                raise InvalidArgument(f"{name} must be one of {expected}, got {value!r}")
        if self.transfer == "indirect" and self.beta is None:
            raise InvalidArgument(
                "beta must be given for transfer='indirect': the KL weight that the baseline was "
                "trained with, got None"
            )
        if self.needs_log_ratio and self.rollout == "greedy":
            raise InvalidArgument(
                "rollout='greedy' draws from no density, which weights='log_ratio' weighs against; "
                "use rollout='sample', or weights='reward_gap'"
            )

    def _check_response(self) -> None:
        """Check what ends a response and how it is shown; bring ids and strings into tuples."""
        require_int("min_new_tokens", self.min_new_tokens, low=0)
        if self.min_new_tokens > self.max_new_tokens:
            raise InvalidArgument(
                f"min_new_tokens must be at most max_new_tokens={self.max_new_tokens}, "
                f"got {self.min_new_tokens}"
            )
        if not isinstance(self.skip_special_tokens, bool):
            raise InvalidArgument(
                f"skip_special_tokens must be True or False, got {self.skip_special_tokens!r}"
            )
        stop: Any = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        is_list = isinstance(stop, (tuple, list))
        if not is_list or not all(isinstance(string, str) and string for string in stop):
            raise InvalidArgument(
                f"stop must be a string that is not empty, or several, got {self.stop!r}"
            )
        object.__setattr__(self, "stop", tuple(stop))
        if self.eos_token_id is not None:
            given: object = self.eos_token_id
            ids = (given,) if _is_int(given) else given
            if not isinstance(ids, (tuple, list)) or not all(_is_int(i) and i >= 0 for i in ids):
                raise InvalidArgument(
                    "eos_token_id must be a token id, a tuple of token ids or None, "
                    f"got {self.eos_token_id!r}"
                )
            object.__setattr__(self, "eos_token_id", tuple(ids))

    @classmethod
    def from_options(
        cls, base: DecodeConfig | None = None, others: Sequence[str] = (), /, **options: Any
    ) -> DecodeConfig:
        """Return `base` (or the defaults) with `options` replaced.

        Args:
            base: settings to start from.
            others: arguments that the caller takes beside the fields, for the message.
            options: fields.

        Raises:
            InvalidArgument: `base` is no `DecodeConfig`, or an option is unknown (the message names
                the nearest known one).
        """
        if not isinstance(base, (DecodeConfig, type(None))):
            raise InvalidArgument(f"config must be a DecodeConfig or None, got {base!r}")
        fields = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in fields:
                known = [*fields, *others]
                elsewhere = _ELSEWHERE.get(name)
                hint = (
                    f"did you mean {elsewhere!r}?" if elsewhere in known else nearest(name, known)
                )
                raise InvalidArgument(f"unknown option {name!r}; {hint}")
        return dataclasses.replace(base or cls(), **options)

    @property
    def end_ids(self) -> tuple[int, ...] | None:
        """`eos_token_id` as it is after checking: a tuple, or None for the model's own."""
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as it is after checking: a tuple."""
        return tuple(self.stop)

    @property
    def kl_weight(self) -> float:
        """`beta`, for settings that cannot do without: indirect transfer is refused without it."""
        assert self.beta is not None, "these settings have no beta"
        return self.beta

    @property
    def rollouts_per_candidate(self) -> int:
        """Roll-outs that really run for a candidate: greedy ones are all the same."""
        return 1 if self.rollout == "greedy" else self.num_rollouts

    @property
    def needs_log_ratio(self) -> bool:
        """Whether roll-outs are scored under the SFT model."""
        return self.transfer == "indirect" and self.weights == "log_ratio"

    @property
    def needs_baseline_reward(self) -> bool:
        """Whether roll-outs are scored by the reward that the baseline was aligned to."""
        return self.transfer == "indirect" and self.weights != "log_ratio"

    @property
    def is_published(self) -> bool:
        """Whether Q is that of the published indirect code, without normalised weights."""
        return self.transfer == "indirect" and self.weights == "published"

    def horizon_at(self, step: int) -> int:
        """Tokens of a roll-out after the candidate, `step` response tokens being emitted."""
        return self.max_new_tokens - step - 1 if self.horizon is None else self.horizon


def _choices() -> dict[str, tuple[Any, ...]]:
    return {
        "strategy": typing.get_args(Strategy),
        "rollout": typing.get_args(Rollout),
        "prior": (*typing.get_args(Role), None),
        "candidates_from": typing.get_args(Role),
        "transfer": typing.get_args(Transfer),
        "weights": typing.get_args(Weights),
        "estimator": typing.get_args(Estimator),
        "backend": (*typing.get_args(Backend), None),
    }


_CHOICES = _choices()


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Whether `value` is a number of Python's; True and False are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def require_int(name: str, value: object, *, low: int = 1) -> None:
    """Refuse what is no integer of at least `low`."""
    if not _is_int(value) or value < low:
        raise InvalidArgument(f"{name} must be an integer of at least {low}, got {value!r}")


def require_positive(name: str, value: object) -> None:
    """Refuse what is no finite number above 0, or so far from 1 that fp32 cannot divide by it."""
    low, high = _SCALES
    if not is_real(value) or not low <= value <= high:
        raise InvalidArgument(
            f"{name} must be a finite number above 0 (from {low:g} to {high:g}), got {value!r}"
        )


class DecodeOptions(TypedDict, total=False):
    """The fields of `DecodeConfig` as keyword arguments, so that an editor completes them."""

    k: int
    alpha: float
    beta: float | None
    num_rollouts: int
    horizon: int | None
    max_new_tokens: int
    min_new_tokens: int
    stop: str | Sequence[str]
    strategy: Strategy
    rollout: Rollout
    rollout_temperature: float
    rollout_top_k: int
    rollout_top_p: float
    prior: Role | None
    candidates_from: Role
    transfer: Transfer
    weights: Weights
    estimator: Estimator
    eos_token_id: int | tuple[int, ...] | None
    num_return_sequences: int
    skip_special_tokens: bool
    seed: int
    backend: Backend | None


@dataclasses.dataclass(frozen=True)
class SpeedOptions:
    """Parts that make decoding cheaper without changing what it means.

    Everything but `compiled_modules` is on by default; a part is switched off to measure it and to
    test its promise: "same tokens", or "same distribution" (the law of arXiv 2405.20495 at the same
    k, n and L).

    Attributes:
        merge_equal: sampled roll-outs that are still equal share one row of the forward pass: the
            n roll-outs of a candidate branch late (same tokens).
        reuse_greedy: the greedy roll-out of the chosen token serves again as that of its arg-max
            child (same tokens).
        score_once: a text that was scored at this or the last step is not scored again (same
            tokens).
        lazy_argmax: with a reward that is declared bounded, candidates that cannot win any more are
            not rolled out (same tokens: the noise of the choice is drawn first).
        refill_slots: with a fixed horizon, a finished prompt's place in the forest goes to the next
            prompt at once (same tokens). Prompts that roll out to the end stay together.
        share_prefixes: what a prompt has in common with another one in the forest is not encoded
            again, and several responses to one prompt are drawn over one copy of it (same tokens
            up to rounding).
        graph_rollouts: on a CUDA device, each forward pass over branches (a depth of the roll-outs,
            the pass of the reward or of the SFT model) is one CUDA graph, replayed, and so is a
            token of plain and of value-guided decoding (same tokens). Equal roll-outs part after
            the first depth then, and a greedy roll-out serves again only where it was run to its
            end.
        cpu_layers: linear and decoder layers on CPU run in kernels made for few rows, over weights
            that were gathered in huge pages, where the system has them (same tokens up to
            rounding).
        compiled_modules: norms, MLPs and rotary embeddings of transformers run as `torch.compile`
            makes them, few kernels in place of many (same tokens up to rounding). It is made for
            CUDA devices, and off by default: compiling takes seconds to minutes in each process,
            and needs a C++ compiler and, on a GPU, Triton, without which it is an error. On a CPU,
            where it gains nothing, layers and linears that `cpu_layers` stands in for are not
            compiled, nor are MLPs that have such linears.
    """

    merge_equal: bool = True
    reuse_greedy: bool = True
    score_once: bool = True
    lazy_argmax: bool = True
    refill_slots: bool = True
    share_prefixes: bool = True
    graph_rollouts: bool = True
    cpu_layers: bool = True
    compiled_modules: bool = False
