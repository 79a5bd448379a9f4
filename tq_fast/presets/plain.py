"""`PlainDecoder`: responses without values, from one model, a mixture of two, or the best of n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..arguments import check_loading, place_models
from ..config import DecodeConfig
from ..errors import DecodingError, InvalidArgument
from ..forest.language import LanguageForest
from ..forest.prefixes import share_prefix
from ..forest.support import check_runs
from ..models.loading import (
    ModelLike,
    TokenizerLike,
    check_same_vocabulary,
    end_token_ids,
    evaluating,
    load_language_model,
    load_reward,
    load_tokenizer,
)
from ..progress import TokenBar
from ..prompts import Prompt, PromptLike, read_prompts
from ..results import DecodeResult, DecodeStats, PromptResult, Response, carry_finished
from ..rewards.base import Opening, RewardFunction, Texts
from ..rewards.causal import CausalReward
from ..rewards.lengths import check_fits
from ..rewards.scorer import Scorer
from ..transfer.budget import BatchShape, MemoryPerPrompt, check_sizes, fit_forest, smaller_after
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
        check_loading({"reward_index": reward_index, "dtype": dtype})
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
        memory_budget: int | None = None,
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
            batch_size: prompts that are decoded together, at most. Results do not depend on it.
            memory_budget: bytes of KV and logits at most, as for `tq_fast.decode`.
            progress: show a progress bar.

        Raises:
            InvalidArgument: an argument is wrong; raised before any forward pass.
            DecodingError: a prompt failed; `finished` holds the responses of earlier batches.
        """
        check_sizes(batch_size, memory_budget)
        read = read_prompts(prompts, self.tokenizer, vocab_size=self.vocab_size)
        self._check(read, config)
        batch_size = min(batch_size, max(1, len(read)))
        size = BatchShape(batch_size, batch_size * num)
        if read and memory_budget is not None:
            needs = self._needs(read, num, config)
            size = fit_forest(needs, batch_size=batch_size, memory_budget=memory_budget)
        stats = DecodeStats()
        results: dict[int, PromptResult] = {}
        with (
            TokenBar(len(read) * num * config.max_new_tokens, visible=progress) as bar,
            evaluating(self._all_models()),
            carry_finished(results),
        ):
            while len(results) < len(read):
                start, counted = len(results), bar.num_done
                group = read[start : start + size.num_slots]
                # Of every prompt so many responses at a time.
                wave = max(1, min(num, size.max_rows // len(group)))
                waves = [range(i, min(i + wave, num)) for i in range(0, num, wave)]
                try:
                    new = self._decode_group(group, weights, waves, config, stats, bar)
                    results.update(enumerate(new, start))
                except torch.OutOfMemoryError as error:
                    size = smaller_after(error, size)
                    bar.advance(counted - bar.num_done)
                except DecodingError as error:
                    place = {"prompt_idx": start + error.prompt_idx, "step": error.step}
                    raise type(error)(error.reason, **place) from error.__cause__
        has_texts = self.tokenizer is not None
        return DecodeResult.collect(list(results.values()), stats, has_texts=has_texts)

    def _decode_group(
        self,
        prompts: list[Prompt],
        weights: Mapping[str, float],
        waves: Sequence[range],
        config: DecodeConfig,
        stats: DecodeStats,
        bar: TokenBar,
    ) -> list[PromptResult]:
        """Decode a few prompts over one forest a model, their responses wave by wave."""
        own, num = DecodeStats(), waves[-1].stop
        forests = self._open(prompts, len(waves[0]), config)
        texts = [prompt.token_ids for prompt in prompts]
        with own.phase("prefill"):
            for forest in forests.values():
                for tree, text in enumerate(texts):
                    # Leave the last token to be encoded: its logits are the next-token logits.
                    known = share_prefix(forest.cache, tree, text[:-1], texts)
                    forest.prefill(tree, text[known:])
        drawn: list[Drawn] = []
        with own.phase("rollout"):
            for numbers in waves:
                new = sample_responses(
                    forests,
                    weights,
                    numbers=numbers,
                    prompt_keys=[prompt.key for prompt in prompts],
                    eos=self.end_ids(config),
                    config=config,
                    on_depth=bar.advance,
                )
                longest = max(len(response.token_ids) for response in new)
                bar.advance(len(new) * (config.max_new_tokens - longest))
                own.rollout_steps += longest - 1
                drawn += new
        # By prompt, and there by number, as the waves came.
        drawn.sort(key=lambda response: response.tree)
        for role, forest in forests.items():
            own.token_forwards[role] = forest.num_token_forwards
            own.peak_kv_bytes[role] = forest.peak_kv_bytes
        scores = [0.0] * len(drawn)
        if self.reward is not None:
            with own.phase("reward"):
                per_call = len(prompts) * len(waves[0])
                scores = self._score(prompts, drawn, per_call, config, own)
            own.rollouts_run = len(drawn)
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
        for model in self.models.values():
            check_runs(model)
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
        per_call: int,
        config: DecodeConfig,
        stats: DecodeStats,
    ) -> list[float]:
        session = self.reward.open(
            Opening(prompts, per_call, max_new=config.max_new_tokens, backend=config.backend)
        )
        responses = [Response(tree, prompt) for tree, prompt in enumerate(prompts)]
        scorer = Scorer(session, responses, bounds=None, remembers=False)
        texts = [(response.tree, tuple(response.token_ids)) for response in drawn]
        scores: list[float] = []
        for start in range(0, len(texts), per_call):
            scores += scorer.score_texts(texts[start : start + per_call])
        stats.token_forwards["reward"] = session.num_token_forwards
        stats.peak_kv_bytes["reward"] = session.peak_kv_bytes
        return scores

    def _needs(self, prompts: Sequence[Prompt], num: int, config: DecodeConfig) -> MemoryPerPrompt:
        """Bytes of a prompt and of a response, for the longest of `prompts`."""
        prefix = max(len(prompt.token_ids) for prompt in prompts)
        per_token = sum(check_runs(model) for model in self.models.values())
        logits = 2 * 4 * self.vocab_size * len(self.models)
        needs = MemoryPerPrompt(per_token * prefix, per_token * config.max_new_tokens + logits, num)
        if not isinstance(self.reward, CausalReward):
            return needs
        whole = check_runs(self.reward.model) * (prefix + config.max_new_tokens)
        return MemoryPerPrompt(needs.per_slot + whole, needs.per_row + whole, num)

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
        settings = f"max_new_tokens={config.max_new_tokens}"
        models = {**self.models, "reward": self.reward}
        for idx, prompt in enumerate(prompts):
            check_fits(idx, prompt, config.max_new_tokens, settings, models)

    def _all_models(self) -> list[Any]:
        scorer = getattr(self.reward, "model", None)
        return [*self.models.values(), *([] if scorer is None else [scorer])]
