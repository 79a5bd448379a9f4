"""One call of a preset: its options read and checked, and the two ways to carry it out."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from ..arguments import check_loading, place_models
from ..config import DecodeConfig
from ..decoder import TransferDecoder
from ..errors import InvalidArgument
from ..models.loading import load_language_model, load_tokenizer
from ..prompts import Prompt, PromptLike
from ..results import Certificate, DecodeResult, StepTrace
from ..transfer.weights import certify
from .plain import PlainDecoder

_DECODER_ARGUMENTS = frozenset(inspect.signature(TransferDecoder).parameters)
_PLAIN_ARGUMENTS = frozenset(inspect.signature(PlainDecoder).parameters)
_RUNNING = ("batch_size", "memory_budget", "progress")
_OTHERS = ("config", *_RUNNING, *sorted(_DECODER_ARGUMENTS))


class PresetCall:
    """The settings of one call of `method`.

    Args:
        method: the preset's name, for messages.
        fixed: config fields that the method fixes.
        models: models that the method uses where they are given, by argument.
        options: what the caller gave beside prompts and models.

    Raises:
        InvalidArgument: an option is unknown, wrong, or another than the method fixes.
    """

    def __init__(
        self,
        method: str,
        fixed: Mapping[str, Any],
        models: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        options = dict(options)
        self.method = method
        self.running = {name: options.pop(name) for name in _RUNNING if name in options}
        base = DecodeConfig.from_options(options.pop("config", None))
        self.loading = {
            name: options.pop(name) for name in tuple(options) if name in _DECODER_ARGUMENTS
        }
        check_loading(self.loading)
        self.models = {name: model for name, model in models.items() if model is not None}
        default = DecodeConfig()
        for name, value in fixed.items():
            in_config = getattr(base, name)
            given = options.get(name, value if in_config == getattr(default, name) else in_config)
            if given != value:
                raise InvalidArgument(
                    f"{name} is {value!r} for the method {method!r}, got {given!r}"
                )
        merged = {**options, **fixed}
        if fixed.get("transfer") == "indirect" and merged.get("beta", base.beta) is None:
            raise InvalidArgument(f"beta is needed by the method {method!r}, got None")
        self.config = DecodeConfig.from_options(base, _OTHERS, **merged)
        baseline_reward = self.loading.pop("baseline_reward", None)
        if self.config.needs_baseline_reward and baseline_reward is not None:
            self.models["baseline_reward"] = baseline_reward

    def require(self, *names: str) -> None:
        """Refuse a call without the models `names`."""
        for name in names:
            if name not in self.models:
                raise InvalidArgument(f"{name} is needed by the method {self.method!r}, got None")

    def sample(
        self, prompts: PromptLike | Any, weights: Mapping[str, float], *, num: int = 1
    ) -> DecodeResult:
        """Decode without values; arguments are those of `PlainDecoder.decode`."""
        loading = {n: value for n, value in self.loading.items() if n in _PLAIN_ARGUMENTS}
        if "reward" not in self.models:
            loading = {n: v for n, v in loading.items() if not n.startswith("reward")}
        decoder = PlainDecoder(**self.models, **loading)
        return decoder.decode(prompts, weights, num=num, config=self.config, **self.running)

    def steer(self, prompts: PromptLike | Any) -> DecodeResult:
        """Decode by Transfer Q*, the baseline rolling out."""
        decoder = TransferDecoder(**self.models, **self.loading)
        return decoder.decode(prompts, config=self.config, **self.running)

    def steer_sft(self, prompts: PromptLike | Any) -> DecodeResult:
        """Decode with the SFT model in every part; the result says "sft" where it took part."""
        loading = dict(self.loading)
        device = place_models(loading.pop("device", None))
        model = load_language_model(
            self.models["sft"], "sft", device=device, dtype=loading.get("dtype", "auto")
        )
        tokenizer = load_tokenizer(loading.pop("tokenizer", None), self.models["sft"], "tokenizer")
        decoder = _SftDecoder(
            model, self.models["reward"], tokenizer=tokenizer, device=device, **loading
        )
        config = dataclasses.replace(self.config, prior="baseline", candidates_from="baseline")
        result = decoder.decode(prompts, config=config, **self.running)
        for counts in (result.stats.token_forwards, result.stats.peak_kv_bytes):
            if "baseline" in counts:
                counts["sft"] = counts.pop("baseline")
        traces = [[_as_sft(step) for step in trace] for trace in result.traces]
        certificates = [
            self._certify_sft(trace, certificate, decoder)
            for trace, certificate in zip(traces, result.certificates, strict=True)
        ]
        return dataclasses.replace(result, traces=traces, certificates=certificates)

    def _certify_sft(
        self, trace: list[StepTrace], certificate: Certificate, decoder: TransferDecoder
    ) -> Certificate:
        bounded = certify(
            self.config,
            prior="sft",
            num_steps=len(trace),
            kl_to_sft=certificate.kl_to_baseline,
            kl_to_baseline=None,
            kl_baseline_to_sft=None,
            log_prior_mass=certificate.log_prior_mass,
            ess=[],
            is_exact=all(step.is_complete for step in trace),
            reward_bounds=decoder.reward_bounds,
        )
        ess = {"median_ess": certificate.median_ess, "min_ess": certificate.min_ess}
        return dataclasses.replace(bounded, **ess)


class _SftDecoder(TransferDecoder):
    """A decoder whose every part is played by the SFT model: its messages say so."""

    def check_length(self, idx: int, prompt: Prompt, config: DecodeConfig) -> None:
        try:
            super().check_length(idx, prompt, config)
        except InvalidArgument as error:
            raise InvalidArgument(
                str(error).replace("the baseline model", "the sft model")
            ) from None


def _as_sft(step: StepTrace) -> StepTrace:
    return dataclasses.replace(step, kl_to_sft=step.kl_to_baseline, kl_to_baseline=None)
