"""`decode` and `TransferDecoder`: what users call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .config import DecodeConfig
from .decoding import ForestDecoder, Players, Response
from .diagnostics import known_ess, warn_of_collapse, warn_of_noise
from .errors import DecodingError, InvalidArgument
from .estimators import Certificate, certify
from .models.language import LanguageForest, max_positions
from .models.loading import (
    ModelLike,
    TokenizerLike,
    check_same_vocabulary,
    end_token_ids,
    evaluating,
    load_language_model,
    load_reward,
    load_tokenizer,
    place_models,
)
from .models.reward import RewardFunction, Texts
from .progress import TokenBar
from .prompts import Prompt, PromptLike, PromptReader, read_prompts
from .results import DecodeResult, DecodeStats, PromptResult

_MODEL_ARGUMENTS = (
    "sft",
    "baseline_reward",
    "tokenizer",
    "reward_tokenizer",
    "baseline_reward_tokenizer",
    "reward_index",
    "reward_bounds",
    "device",
    "dtype",
)


def decode(
    prompts: PromptLike | Sequence[PromptLike],
    baseline: ModelLike,
    reward: ModelLike | RewardFunction,
    *,
    config: DecodeConfig | None = None,
    batch_size: int = 8,
    progress: bool = False,
    **options: Any,
) -> DecodeResult:
    """Decode `prompts` with Transfer Q* (arXiv 2405.20495, Algorithm 1).

    Equals, for each new token: take the k likeliest next tokens, complete each with `baseline`,
    score the whole texts with `reward`, and sample from `softmax(log pi_prior + Q / alpha)`.

    Args:
        prompts: text, chat messages or token ids (a tensor or a list of integers), or a list of
            any of these.
        baseline: the aligned model that rolls out: a hub id, a local folder or a loaded model.
        reward: a sequence classifier (hub id, folder or model; any tokenizer), or a function
            `(prompts, responses) -> floats`.
        config: settings to start from; `options` replace its fields.
        batch_size: prompts that are decoded together. Results do not depend on it.
        progress: show a progress bar.
        **options: every field of `DecodeConfig`, and the keyword arguments of `TransferDecoder`.

    Returns:
        Responses, traces, certificates and counts, in the order of the prompts.

    Raises:
        InvalidArgument: an argument is wrong; raised before any forward pass.
        UnsupportedModel: a model uses a feature that the shared-prefix cache does not honour.
        DecodingError: a prompt failed on the way; its `finished` holds the responses that were
            complete.
    """
    models = {name: options.pop(name) for name in _MODEL_ARGUMENTS if name in options}
    config = DecodeConfig.from_options(config, **options)
    decoder = TransferDecoder(baseline, reward, **models)
    return decoder.decode(prompts, config=config, batch_size=batch_size, progress=progress)


class TransferDecoder:
    """Models that are loaded once, for many calls of `decode`.

    Args:
        baseline: as for `decode`.
        reward: as for `decode`.
        sft: the SFT model: the prior pi_sft and, for indirect transfer, the trajectory log-ratio.
            Must have the baseline's vocabulary.
        baseline_reward: the reward that the baseline was aligned to (indirect transfer with
            weights="reward_gap" or "published").
        tokenizer: the language models'; None: that in the baseline's own folder.
        reward_tokenizer: the reward's; None: that in its own folder.
        baseline_reward_tokenizer: likewise.
        reward_index: which label of a reward model with several labels is the reward.
        reward_bounds: (lo, hi) between which the reward always lies; for the certificate.
        device: where models that are named are put; None: a GPU if there is one.
        dtype: of models that are named, a `torch.dtype` or "auto" (as they were saved).

    Raises:
        InvalidArgument: an argument is wrong; the message names it.
        UnsupportedModel: a model uses a feature that the shared-prefix cache does not honour.
    """

    def __init__(
        self,
        baseline: ModelLike,
        reward: ModelLike | RewardFunction,
        *,
        sft: ModelLike | None = None,
        baseline_reward: ModelLike | RewardFunction | None = None,
        tokenizer: TokenizerLike | None = None,
        reward_tokenizer: TokenizerLike | None = None,
        baseline_reward_tokenizer: TokenizerLike | None = None,
        reward_index: int | None = None,
        reward_bounds: tuple[float, float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
    ) -> None:
        self.reward_bounds = _check_bounds(reward_bounds)
        place = place_models(device)
        self.baseline = load_language_model(baseline, "baseline", device=place, dtype=dtype)
        self.tokenizer = load_tokenizer(tokenizer, baseline, "tokenizer")
        self.sft = None
        if sft is not None:
            self.sft = load_language_model(sft, "sft", device=place, dtype=dtype)
            own = load_tokenizer(None, sft, "sft")
            check_same_vocabulary(self.tokenizer, own, self.baseline, self.sft)
        loading = {
            "texts": Texts(self.tokenizer),
            "vocab_size": self.baseline.get_output_embeddings().weight.shape[0],
            "device": place,
            "dtype": dtype,
        }
        self.reward = load_reward(
            reward, "reward", tokenizer=reward_tokenizer, label=reward_index, **loading
        )
        self.baseline_reward = None
        if baseline_reward is not None:
            self.baseline_reward = load_reward(
                baseline_reward,
                "baseline_reward",
                tokenizer=baseline_reward_tokenizer,
                label=None,
                **loading,
            )

    # Not inference_mode: its tensors could not be used in training afterwards.
    @torch.no_grad()
    def decode(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        *,
        config: DecodeConfig | None = None,
        batch_size: int = 8,
        progress: bool = False,
        on_token: Callable[[int], None] | None = None,
        on_finished: Callable[[int, PromptResult], None] | None = None,
        **options: Any,
    ) -> DecodeResult:
        """Decode `prompts`; arguments, result and errors are those of `tq_fast.decode`.

        `on_token(idx)` is called after every new token of prompt `idx`, `on_finished(idx, result)`
        as soon as its response is complete. What they raise ends the call.
        """
        config = DecodeConfig.from_options(config, **options)
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise InvalidArgument(
                f"batch_size must be an integer of at least 1, got {batch_size!r}"
            )
        prior = self._check_config(config)
        read = self._read_prompts(prompts, config)
        eos = config.eos_token_id
        if eos is None:
            eos = end_token_ids(self.baseline, self.tokenizer)
        stats = DecodeStats()
        responses = [Response(idx, prompt) for idx, prompt in enumerate(read)]
        finished: dict[int, PromptResult] = {}

        def note(response: Response, is_finished: bool) -> None:
            idx = response.idx
            unused = config.max_new_tokens - len(response.token_ids) if is_finished else 0
            bar.advance(1 + unused)
            if on_token is not None:
                on_token(idx)
            if is_finished:
                finished[idx] = self._finish(response, config, prior)
                if on_finished is not None:
                    on_finished(idx, finished[idx])

        num_tokens = len(read) * config.max_new_tokens
        rewards = (getattr(r, "model", None) for r in (self.reward, self.baseline_reward))
        models = [m for m in (self.baseline, self.sft, *rewards) if m is not None]
        with TokenBar(num_tokens, visible=progress) as bar, evaluating(models):
            for start in range(0, len(responses), batch_size):
                group = responses[start : start + batch_size]
                try:
                    stats.add(self._decode_group(group, config, prior, eos, note))
                except DecodingError as error:
                    error.finished = {idx: done.sequence for idx, done in finished.items()}
                    raise
        traces = [response.trace for response in responses]
        warn_of_noise(traces, config)
        warn_of_collapse(traces, config)
        results = [finished[response.idx] for response in responses]
        return DecodeResult(
            texts=None if self.tokenizer is None else [result.text for result in results],
            sequences=[result.sequence for result in results],
            traces=[result.trace for result in results],
            certificate=[result.certificate for result in results],
            stats=stats,
        )

    def prompt_reader(self) -> PromptReader:
        """Reads prompts one at a time into what `decode` takes.

        For prompts that are to be decoded in several calls with the random streams of one.
        """
        return PromptReader(self.tokenizer, vocab_size=self._vocab_size())

    def _decode_group(
        self,
        group: list[Response],
        config: DecodeConfig,
        prior: str,
        eos: tuple[int, ...],
        note: Callable[[Response, bool], None],
    ) -> DecodeStats:
        """Decode a few prompts together over one forest a model."""
        longest = max(len(response.prompt.token_ids) for response in group)
        horizon = config.max_new_tokens if config.horizon is None else config.horizon
        num_rows = len(group) * config.k * config.rollouts_per_candidate
        sizes = {
            "num_trees": len(group),
            "prefix_capacity": longest + config.max_new_tokens,
            "backend": config.backend,
        }
        prompts = [response.prompt for response in group]
        max_new = config.max_new_tokens + horizon
        opening = {"num_rows": num_rows, "max_new": max_new, "backend": config.backend}
        players = Players(
            baseline=LanguageForest(
                self.baseline, num_rows=num_rows, branch_capacity=max(1, horizon), **sizes
            ),
            sft=None
            if self.sft is None
            else LanguageForest(
                self.sft,
                num_rows=num_rows if config.needs_log_ratio else len(group),
                branch_capacity=max(1, horizon) if config.needs_log_ratio else 1,
                **sizes,
            ),
            reward=self.reward.open(prompts, **opening),
            baseline_reward=None
            if self.baseline_reward is None
            else self.baseline_reward.open(prompts, **opening),
        )
        stats = DecodeStats()
        forest = ForestDecoder(players, group, config, prior=prior, eos=eos, stats=stats)
        forest.run(note)
        for role, player in vars(players).items():
            if player is not None:
                stats.token_forwards[role] = player.num_token_forwards
                stats.peak_kv_bytes[role] = player.peak_kv_bytes
        return stats

    def _check_config(self, config: DecodeConfig) -> str:
        """Check what depends on the models; return the prior in use."""
        if config.candidates_from == "sft" and self.sft is None:
            raise InvalidArgument("candidates_from='sft' needs an sft model, got sft=None")
        if config.prior == "sft" and self.sft is None:
            raise InvalidArgument("prior='sft' needs an sft model, got sft=None")
        if config.needs_log_ratio and self.sft is None:
            raise InvalidArgument("weights='log_ratio' needs an sft model, got sft=None")
        if config.needs_baseline_reward and self.baseline_reward is None:
            raise InvalidArgument(f"weights={config.weights!r} needs baseline_reward, got None")
        vocab_size = self._vocab_size()
        if config.k > vocab_size:
            raise InvalidArgument(f"k must be at most the vocabulary, {vocab_size}, got {config.k}")
        for token in config.eos_token_id or ():
            if token >= vocab_size:
                raise InvalidArgument(
                    f"eos_token_id must be inside of the vocabulary [0, {vocab_size}), got {token}"
                )
        return config.prior or ("baseline" if self.sft is None else "sft")

    def _read_prompts(self, prompts: Any, config: DecodeConfig) -> list[Prompt]:
        read = read_prompts(prompts, self.tokenizer, vocab_size=self._vocab_size())
        for idx, prompt in enumerate(read):
            self.check_length(idx, prompt, config)
        return read

    def check_length(self, idx: int, prompt: Prompt, config: DecodeConfig) -> None:
        """Refuse a prompt that is too long for a language model; `decode` does this by itself.

        Raises:
            InvalidArgument: the message names `prompts[idx]`, its length and what is allowed.
        """
        num_tokens = len(prompt.token_ids) + config.max_new_tokens + (config.horizon or 0)
        for role, model in (("baseline", self.baseline), ("sft", self.sft)):
            limit = None if model is None else max_positions(model)
            if limit is not None and num_tokens > limit:
                raise InvalidArgument(
                    f"prompts[{idx}] has {len(prompt.token_ids)} tokens; with max_new_tokens="
                    f"{config.max_new_tokens} and horizon={config.horizon} that makes "
                    f"{num_tokens}, but the {role} model allows {limit}"
                )

    def _vocab_size(self) -> int:
        models = [model for model in (self.baseline, self.sft) if model is not None]
        return min(model.get_output_embeddings().weight.shape[0] for model in models)

    def _finish(self, response: Response, config: DecodeConfig, prior: str) -> PromptResult:
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(response.token_ids, skip_special_tokens=True)
        sequence = torch.tensor(response.token_ids)
        certificate = self._certify(response, config, prior)
        return PromptResult(text, sequence, response.trace, certificate)

    def _certify(self, response: Response, config: DecodeConfig, prior: str) -> Certificate:
        trace = response.trace
        return certify(
            config,
            prior=prior,
            num_steps=len(trace),
            kl_to_sft=None if self.sft is None else sum(step.kl_to_sft for step in trace),
            kl_to_baseline=sum(step.kl_to_baseline for step in trace),
            kl_baseline_to_sft=None
            if self.sft is None
            else sum(step.kl_baseline_to_sft for step in trace),
            log_prior_mass=sum(float(step.prior_logprobs.logsumexp(-1)) for step in trace),
            ess=[] if config.is_published else known_ess(trace),
            reward_bounds=self.reward_bounds,
        )


def _check_bounds(bounds: Any) -> tuple[float, float] | None:
    if bounds is None:
        return None
    is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2
    if not is_pair or not all(isinstance(end, (int, float)) for end in bounds):
        raise InvalidArgument(f"reward_bounds must be a pair (lo, hi), got {bounds!r}")
    if not bounds[0] < bounds[1]:
        raise InvalidArgument(f"reward_bounds must have lo < hi, got {bounds!r}")
    return float(bounds[0]), float(bounds[1])
