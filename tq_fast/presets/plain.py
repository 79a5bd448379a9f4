"""Decoding without values: responses from one model, a mixture of two, or the best of n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import DecodeConfig, Role
from ..errors import DecodingError
from ..forest import share_prefix
from ..forest.language import LanguageForest
from ..forest.support import check_runs
from ..prompts import Prompt, PromptLike, repeat_prompts
from ..prompts.chats import TemplateOptions
from ..results import DecodeResult, DecodeStats, PromptResult, Response
from ..rewards.base import Opening
from ..rewards.scorer import Scorer
from ..session import Report, Session, neutral_torch
from ..transfer.budget import BatchShape, MemoryPerPrompt
from ..transfer.roles import distinct
from .whole_responses import Drawn, certify_plain, sample_responses, trace_plain


@neutral_torch()
@torch.no_grad()
def sample(
    session: Session,
    prompts: PromptLike | Sequence[PromptLike],
    weights: Mapping[Role, float],
    *,
    num: int = 1,
    config: DecodeConfig,
    template_options: TemplateOptions | None = None,
    **running: Any,
) -> DecodeResult:
    """Draw a response from `softmax(sum_m c_m log pi_m)` for each prompt.

    The package's own forest and random streams are used, without candidates and values.

    Args:
        session: models, and the reward that chooses among several responses.
        prompts: as for `tq_fast.decode`.
        weights: c_m by role, summing to 1; the divergence to a model of weight 0 is measured all
            the same.
        num: responses drawn for a prompt; the reward chooses the first of the highest score.
        config: strategy, rollout_temperature, rollout_top_k, rollout_top_p, max_new_tokens,
            min_new_tokens, stop, eos_token_id, num_return_sequences, skip_special_tokens, seed and
            backend are read.
        template_options: as for `tq_fast.decode`.
        **running: the keyword arguments of `Session.run`.

    Raises:
        InvalidArgument: an argument is wrong; raised before any forward pass.
        DecodingError: a prompt failed; `finished` holds the responses of earlier batches.
    """
    method = _PlainMethod(session, weights, num, config)
    read = session.read(prompts, template_options)
    for idx, prompt in enumerate(read):
        settings = f"max_new_tokens={config.max_new_tokens}"
        session.check_fits(idx, prompt, config.max_new_tokens, settings)
    return session.run(repeat_prompts(read, config.num_return_sequences), method, **running)


class _PlainMethod:
    """Plain sampling as a session runs it; the arguments are those of `sample`."""

    def __init__(
        self, session: Session, weights: Mapping[Role, float], num: int, config: DecodeConfig
    ) -> None:
        self.session = session
        self.weights = weights
        self.config = config
        self.eos = session.end_ids(config)
        self.stop = session.stop_strings(config)
        self.rows_per_prompt = num
        self.tokens_per_prompt = num * config.max_new_tokens

    def memory(self, prompts: Sequence[Prompt]) -> MemoryPerPrompt:
        """Return the bytes of a prompt and of a response, for the longest of `prompts`."""
        models = distinct(self.session.languages).values()
        prefix = max(len(prompt.token_ids) for prompt in prompts)
        per_token = sum(check_runs(model) for model in models)
        logits = 2 * 4 * self.session.vocab_size * len(models)
        whole = prefix + self.config.max_new_tokens
        scored = sum(reward.kv_bytes_per_token() * whole for reward in self._rewards())
        return MemoryPerPrompt(
            per_token * prefix + scored,
            per_token * self.config.max_new_tokens + logits + scored,
            self.rows_per_prompt,
        )

    def decode(
        self, responses: list[Response], shape: BatchShape, stats: DecodeStats, report: Report
    ) -> None:
        """Decode the first prompts over one forest for each model, in waves of responses."""
        group = responses[: shape.num_prompts]
        num = self.rows_per_prompt
        per_wave = max(1, min(num, shape.max_rows // len(group)))
        own, counted = DecodeStats(), report.bar.num_done
        try:
            drawn = self._draw(group, per_wave, own, report)
            scores = self._score(group, drawn, per_wave, own)
        except torch.OutOfMemoryError:
            report.bar.advance(counted - report.bar.num_done)
            raise
        stats.add(own)
        for tree, response in enumerate(group):
            mine = slice(tree * num, (tree + 1) * num)
            result = self._finish(drawn[mine], scores[mine])
            stats.num_steps += len(result.sequence)
            report.finish(response.idx, result, num_unused=0)

    def _draw(
        self, group: Sequence[Response], per_wave: int, stats: DecodeStats, report: Report
    ) -> list[Drawn]:
        """Return every response of every prompt, ordered by prompt and then by number."""
        num, longest_wave = self.rows_per_prompt, len(group) * per_wave
        forests = self._open([response.prompt for response in group], longest_wave)
        texts = [response.prompt.token_ids for response in group]
        with stats.phase("prefill"):
            for forest in distinct(forests).values():
                for tree, text in enumerate(texts):
                    # Leave the last token to be encoded: its logits are the next-token logits.
                    known = share_prefix(forest.cache, tree, text[:-1], texts)
                    forest.prefill(tree, text[known:])
        drawn: list[Drawn] = []
        with stats.phase("rollout"):
            for start in range(0, num, per_wave):
                try:
                    new = sample_responses(
                        forests,
                        self.weights,
                        numbers=range(start, min(start + per_wave, num)),
                        prompt_keys=[response.prompt.key for response in group],
                        eos=self.eos,
                        stop=self.stop,
                        vocab_size=self.session.num_tokens,
                        config=self.config,
                        on_depth=report.bar.advance,
                    )
                except DecodingError as error:
                    place = {"prompt_idx": group[error.prompt_idx].idx, "step": error.step}
                    raise type(error)(error.reason, **place) from error.__cause__
                longest = max(len(response.token_ids) for response in new)
                report.bar.advance(len(new) * (self.config.max_new_tokens - longest))
                stats.rollout_steps += longest - 1
                drawn += new
        for role, forest in distinct(forests).items():
            stats.token_forwards[role] = forest.num_token_forwards
            stats.peak_kv_bytes[role] = forest.peak_kv_bytes
        return sorted(drawn, key=lambda response: response.tree)

    def _open(self, prompts: Sequence[Prompt], num_rows: int) -> dict[Role, LanguageForest]:
        languages = self.session.languages
        by_model: dict[PreTrainedModel, LanguageForest] = {}
        for model in distinct(languages).values():
            check_runs(model)
            by_model[model] = LanguageForest(
                model,
                num_trees=len(prompts),
                num_rows=num_rows,
                prefix_capacity=max(len(prompt.token_ids) for prompt in prompts),
                branch_capacity=max(1, self.config.max_new_tokens - 1),
                backend=self.config.backend,
            )
        return {role: by_model[model] for role, model in languages.items()}

    def _score(
        self,
        group: Sequence[Response],
        drawn: Sequence[Drawn],
        per_wave: int,
        stats: DecodeStats,
    ) -> list[float]:
        """Return the score of every response; empty without a reward."""
        scores: list[float] = []
        for reward in self._rewards():
            per_call = len(group) * per_wave
            with stats.phase("reward"):
                session = reward.open(
                    Opening(
                        [response.prompt for response in group],
                        per_call,
                        max_new=self.config.max_new_tokens,
                        backend=self.config.backend,
                    )
                )
                scorer = Scorer(session, len(group), bounds=None, remembers=False, stop=self.stop)
                texts = [(response.tree, tuple(response.token_ids)) for response in drawn]
                for start in range(0, len(texts), per_call):
                    scores += scorer.score_texts(texts[start : start + per_call], group)
                stats.token_forwards["reward"] = session.num_token_forwards
                stats.peak_kv_bytes["reward"] = session.peak_kv_bytes
            stats.rollouts_run = len(drawn)
        return scores

    def _rewards(self) -> list[Any]:
        """Return the reward that chooses, in a list that is empty without one."""
        return [reward for role, reward in self.session.rewards.items() if role == "reward"]

    def _finish(self, drawn: Sequence[Drawn], scores: Sequence[float]) -> PromptResult:
        """Return the result of a prompt: its first response of the highest score."""
        winner = drawn[scores.index(max(scores))] if scores else drawn[0]
        return PromptResult(
            self.session.text_of(winner.token_ids, self.config),
            torch.tensor(winner.token_ids),
            trace_plain(winner, torch.tensor(scores, dtype=torch.float32)),
            certify_plain(winner, self.weights, num=max(1, len(scores))),
        )
