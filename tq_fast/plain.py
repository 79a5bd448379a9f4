"""`PlainDecoder`: responses without values, from one model, a mixture of two, or the best of n."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .config import DecodeConfig
from .errors import DecodingError, InvalidArgument, RewardError
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
from .prompts import Prompt, PromptLike, read_prompts
from .results import DecodeResult, DecodeStats, PromptResult
from .sampling import Drawn, certify_plain, sample_responses, trace_plain


class PlainDecoder:
    """Decodes over the package's own forest and random streams, without candidates and values.

    Args:
        sft: the SFT model, or None.
        baseline: the baseline model, or None; one of the two must be there.
        reward: the reward that chooses among n responses, or None.
        tokenizer: the language models'; None: that in the baseline's own folder, else the SFT's.
        reward_tokenizer: the reward's; None: that in its own folder.
        reward_index: which label of a reward model with several labels is the reward.
        device: where models that are named are put; None: a GPU if there is one.
        dtype: of models that are named, a `torch.dtype` or "auto" (as they were saved).

    Raises:
        InvalidArgument: an argument is wrong; the message names it.
        UnsupportedModel: a model uses a feature that the shared-prefix cache does not honour.
    """

    def __init__(
        self,
        *,
        sft: ModelLike | None = None,
        baseline: ModelLike | None = None,
        reward: ModelLike | RewardFunction | None = None,
        tokenizer: TokenizerLike | None = None,
        reward_tokenizer: TokenizerLike | None = None,
        reward_index: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "auto",
    ) -> None:
        place = place_models(device)
        given = {"baseline": baseline, "sft": sft}
        self.models = {
            role: load_language_model(model, role, device=place, dtype=dtype)
            for role, model in given.items()
            if model is not None
        }
        main = sft if baseline is None else baseline
        self.tokenizer = load_tokenizer(tokenizer, main, "tokenizer")
        if len(self.models) == 2:
            own = load_tokenizer(None, sft, "sft")
            check_same_vocabulary(self.tokenizer, own, *self.models.values())
        sizes = [model.get_output_embeddings().weight.shape[0] for model in self.models.values()]
        self.vocab_size = min(sizes)
        self.reward = None
        if reward is not None:
            self.reward = load_reward(
                reward,
                "reward",
                tokenizer=reward_tokenizer,
                label=reward_index,
                texts=Texts(self.tokenizer),
                vocab_size=sizes[0],
                device=place,
                dtype=dtype,
            )

    @torch.no_grad()
    def decode(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        weights: Mapping[str, float],
        *,
        num: int = 1,
        config: DecodeConfig,
        batch_size: int = 8,
        progress: bool = False,
    ) -> DecodeResult:
        """Draw a response from `softmax(sum_m c_m log pi_m)` for each prompt.

        Args:
            prompts: as for `tq_fast.decode`.
            weights: c_m by role ("sft", "baseline"), summing to 1; the divergence to a model of
                weight 0 is measured all the same.
            num: responses for a prompt; of several the reward chooses the first highest.
            config: strategy, rollout_temperature, rollout_top_k, rollout_top_p, max_new_tokens,
                eos_token_id, seed and backend are read.
            batch_size: prompts that are decoded together. Results do not depend on it.
            progress: show a progress bar.

        Raises:
            InvalidArgument: an argument is wrong; raised before any forward pass.
            DecodingError: a prompt failed; `finished` holds the responses of earlier batches.
        """
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise InvalidArgument(
                f"batch_size must be an integer of at least 1, got {batch_size!r}"
            )
        read = read_prompts(prompts, self.tokenizer, vocab_size=self.vocab_size)
        self._check(read, config)
        stats = DecodeStats()
        results: list[PromptResult] = []
        with (
            TokenBar(len(read) * config.max_new_tokens, visible=progress) as bar,
            evaluating(self._all_models()),
        ):
            for start in range(0, len(read), batch_size):
                group = read[start : start + batch_size]
                try:
                    results += self._decode_group(group, weights, num, config, stats, bar)
                except DecodingError as error:
                    moved = type(error)(
                        error.reason, prompt_idx=start + error.prompt_idx, step=error.step
                    )
                    moved.finished = {idx: done.sequence for idx, done in enumerate(results)}
                    raise moved from error.__cause__
        return DecodeResult(
            texts=None if self.tokenizer is None else [result.text for result in results],
            sequences=[result.sequence for result in results],
            traces=[result.trace for result in results],
            certificate=[result.certificate for result in results],
            stats=stats,
        )

    def _decode_group(
        self,
        prompts: list[Prompt],
        weights: Mapping[str, float],
        num: int,
        config: DecodeConfig,
        stats: DecodeStats,
        bar: TokenBar,
    ) -> list[PromptResult]:
        own = DecodeStats()
        forests = self._open(prompts, num, config)
        with own.phase("prefill"):
            for forest in forests.values():
                for tree, prompt in enumerate(prompts):
                    forest.prefill(tree, prompt.token_ids)
        with own.phase("rollout"):
            drawn = sample_responses(
                forests,
                weights,
                num=num,
                prompt_keys=[prompt.key for prompt in prompts],
                eos=self.end_ids(config),
                config=config,
                on_depth=lambda: bar.advance(len(prompts)),
            )
        longest = max(len(response.token_ids) for response in drawn)
        bar.advance(len(prompts) * (config.max_new_tokens - longest))
        for role, forest in forests.items():
            own.token_forwards[role] = forest.num_token_forwards
            own.peak_kv_bytes[role] = forest.peak_kv_bytes
        scores = [0.0] * len(drawn)
        if self.reward is not None:
            with own.phase("reward"):
                scores = self._score(prompts, drawn, config, own)
            own.rollouts_run = len(drawn)
        own.rollout_steps = longest - 1
        finished = []
        for start in range(0, len(drawn), num):
            mine = scores[start : start + num]
            winner = drawn[start + mine.index(max(mine))]
            own.num_steps += len(winner.token_ids)
            rewards = torch.tensor(mine if self.reward is not None else [])
            finished.append(self._finish(winner, rewards, weights))
        stats.add(own)
        return finished

    def _open(
        self, prompts: Sequence[Prompt], num: int, config: DecodeConfig
    ) -> dict[str, LanguageForest]:
        return {
            role: LanguageForest(
                model,
                num_trees=len(prompts),
                num_rows=len(prompts) * num,
                prefix_capacity=max(len(prompt.token_ids) for prompt in prompts),
                branch_capacity=max(1, config.max_new_tokens - 1),
                backend=config.backend,
            )
            for role, model in self.models.items()
        }

    def _score(
        self,
        prompts: Sequence[Prompt],
        drawn: Sequence[Drawn],
        config: DecodeConfig,
        stats: DecodeStats,
    ) -> list[float]:
        session = self.reward.open(
            prompts, num_rows=len(drawn), max_new=config.max_new_tokens, backend=config.backend
        )
        last = max(len(response.token_ids) for response in drawn) - 1
        responses = [response.token_ids for response in drawn]
        try:
            scores = list(session.score([response.tree for response in drawn], responses))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            message = f"the reward raised {error!r}"
            raise RewardError(message, prompt_idx=0, step=last) from error
        if len(scores) != len(drawn):
            message = f"the reward returned {len(scores)} scores for {len(drawn)} responses"
            raise RewardError(message, prompt_idx=0, step=last)
        for response, score in zip(drawn, scores, strict=True):
            if not math.isfinite(score):
                step = len(response.token_ids) - 1
                message = f"the reward returned {score}"
                raise RewardError(message, prompt_idx=response.tree, step=step)
        stats.token_forwards["reward"] = session.num_token_forwards
        stats.peak_kv_bytes["reward"] = session.peak_kv_bytes
        return scores

    def _finish(
        self, drawn: Drawn, rewards: torch.Tensor, weights: Mapping[str, float]
    ) -> PromptResult:
        text = None
        if self.tokenizer is not None:
            text = self.tokenizer.decode(drawn.token_ids, skip_special_tokens=True)
        certificate = certify_plain(drawn, weights, num=max(1, len(rewards)))
        return PromptResult(
            text, torch.tensor(drawn.token_ids), trace_plain(drawn, rewards), certificate
        )

    def end_ids(self, config: DecodeConfig) -> tuple[int, ...]:
        """The ids that end a response: the config's, else the baseline's or the SFT model's own."""
        if config.eos_token_id is not None:
            return config.eos_token_id
        return end_token_ids(next(iter(self.models.values())), self.tokenizer)

    def _check(self, prompts: Sequence[Prompt], config: DecodeConfig) -> None:
        for token in config.eos_token_id or ():
            if token >= self.vocab_size:
                raise InvalidArgument(
                    "eos_token_id must be inside of the vocabulary "
                    f"[0, {self.vocab_size}), got {token}"
                )
        for idx, prompt in enumerate(prompts):
            num_tokens = len(prompt.token_ids) + config.max_new_tokens
            for role, model in self.models.items():
                limit = max_positions(model)
                if limit is not None and num_tokens > limit:
                    raise InvalidArgument(
                        f"prompts[{idx}] has {len(prompt.token_ids)} tokens; with max_new_tokens="
                        f"{config.max_new_tokens} that makes {num_tokens}, but the {role} model "
                        f"allows {limit}"
                    )

    def _all_models(self) -> list[Any]:
        scorer = getattr(self.reward, "model", None)
        return [*self.models.values(), *([] if scorer is None else [scorer])]
