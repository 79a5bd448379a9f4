"""Causal sequence classifiers as rewards, over a forest: what was encoded stays encoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ..copies import upload
from ..forest import common_length, share_prefix
from ..forest.language import Forest
from ..forest.logprobs import split_by_length
from ..forest.support import check_runs
from ..prompts import Prompt
from .base import Opening, RewardSession, drop_from
from .classifier import ClassifierReward, without_padding


class CausalReward(ClassifierReward):
    """A causal sequence classifier over its own forest.

    The prompt and the emitted text are encoded once; a step encodes only what is new. Equals
    `model(input_ids).logits[0, label]` on the whole sequence, with the head computed in fp32. As in
    transformers, the score is read at the last token that is not padding.
    """

    model: PreTrainedModel

    def open(self, opening: Opening) -> RewardSession:
        """Start on the prompts of a forest, over a forest of the reward's own."""
        prompts = (*opening.prompts, *opening.waiting)
        check_runs(self.model)
        longest = max(len(prompt.token_ids) for prompt in prompts)
        return _CausalSession(self, opening, capacity=longest + opening.max_new)

    def kv_bytes_per_token(self) -> int:
        """Bytes of KV that a token takes in the forest."""
        return check_runs(self.model)


class _CausalSession:
    """Keeps, for each tree, the encoded prefix and the rows of the last call.

    What the new rows of a tree have in common is its prefix now. It is compared with what is
    stored: a stored prefix that went too far is cut back, and one that fell short takes over the
    tokens that a row of the last call encoded already. What was cut back, or kept on purpose, is
    still held behind the prefix, and serves again where a later prefix reaches that far.
    """

    def __init__(self, reward: CausalReward, opening: Opening, *, capacity: int) -> None:
        self.reward = reward
        self.forms = [reward.form(prompt) for prompt in opening.prompts]
        model = reward.model
        self.pad = model.config.get_text_config().pad_token_id
        self.forest, self._lease = opening.forests.open(
            Forest,
            model,
            num_trees=len(self.forms),
            num_rows=opening.num_rows,
            prefix_capacity=capacity,
            branch_capacity=1,
            backend=opening.backend,
            graphs=opening.graphs,
            compiled_modules=opening.compiled_modules,
        )
        self.prefixes: list[list[int]] = [[] for _ in self.forms]
        # Tokens whose KV lies in each tree's prefix, those behind its end included.
        self.held: list[list[int]] = [[] for _ in self.forms]
        # For each tree the rows of the cache, and what they hold.
        self.last_rows: list[list[tuple[int, list[int]]]] = [[] for _ in self.forms]

    @property
    def num_token_forwards(self) -> int:
        return self.forest.num_token_forwards

    @property
    def peak_kv_bytes(self) -> int:
        return self.forest.cache.num_bytes

    def score(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        rows = [
            without_padding(self.reward.read(self.forms[tree], response).token_ids, self.pad)
            for tree, response in zip(trees, responses, strict=True)
        ]
        longest = max(map(len, rows))
        self.forest.cache.reserve(prefix_capacity=longest, branch_capacity=1)
        for tree in sorted(set(trees)):
            self._extend_prefix(tree, [rows[i] for i, t in enumerate(trees) if t == tree])
        suffixes = [row[len(self.prefixes[tree]) :] for tree, row in zip(trees, rows, strict=True)]
        self.forest.cache.reserve(prefix_capacity=0, branch_capacity=max(map(len, suffixes)))
        self.last_rows = [[] for _ in self.prefixes]
        scores = [math.nan] * len(rows)
        first_row = 0
        # Short rows apart from long ones, so that little is padded.
        for chunk in split_by_length(
            list(map(len, suffixes)),
            device_type=self.forest.device.type,
            max_rows=self.forest.cache.num_rows,
        ):
            found = self._forward(
                [trees[i] for i in chunk], [suffixes[i] for i in chunk], first_row
            )
            for row, i in enumerate(chunk, first_row):
                scores[i] = found[row - first_row]
                self.last_rows[trees[i]].append((row, suffixes[i]))
            first_row += len(chunk)
        return scores

    def keep(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> None:
        cache = self.forest.cache
        for tree, response in zip(trees, responses, strict=True):
            read = self.reward.read(self.forms[tree], response)
            text = without_padding(read.token_ids, self.pad)
            prefix = self.prefixes[tree]
            rows = {tuple(suffix): row for row, suffix in self.last_rows[tree]}
            row = rows.get(tuple(text[len(prefix) :]))
            if row is not None and text[: len(prefix)] == prefix:
                cache.commit_rows([tree], [row], [len(text) - len(prefix)])
                cache.truncate(tree, len(prefix))
                self.held[tree] = text

    def replace_tree(self, tree: int, prompt: Prompt) -> None:
        self.forest.cache.truncate(tree, 0)
        self.forms[tree] = self.reward.form(prompt)
        self.prefixes[tree], self.held[tree], self.last_rows[tree] = [], [], []

    def drop_tree(self, tree: int) -> None:
        # The cache moves the prefix of the last tree, and nothing that lies behind its end.
        self.held[-1] = self.prefixes[-1]
        self.forest.cache.drop_tree(tree)
        for entries in (self.forms, self.prefixes, self.held, self.last_rows):
            drop_from(entries, tree)

    def _extend_prefix(self, tree: int, rows: list[list[int]]) -> None:
        # Every row keeps a token of its own, since its score is read there.
        common = rows[0][: min(common_length(rows), min(map(len, rows)) - 1)]
        stored, held = self.prefixes[tree], self.held[tree]
        if not held:
            known = share_prefix(self.forest.cache, tree, common, self.prefixes)
            if common[known:]:
                self.forest.run_prefill(self.forest.model.base_model, tree, common[known:])
            self.prefixes[tree] = self.held[tree] = common
            return
        kept = common_length([held, common])
        num_encoded, best_row = 0, 0
        if kept >= len(stored):
            for row, suffix in self.last_rows[tree]:
                length = common_length([common[len(stored) :], suffix])
                if length > num_encoded:
                    num_encoded, best_row = length, row
        if num_encoded and len(stored) + num_encoded > kept:
            self.forest.cache.commit_rows([tree], [best_row], [num_encoded])
            self.held[tree] = common[: len(stored) + num_encoded]
            self.prefixes[tree] = self.held[tree]
        else:
            self.forest.cache.prefix_len[tree] = kept
            self.prefixes[tree] = common[:kept]

    def _forward(
        self, trees: Sequence[int], suffixes: list[list[int]], first_row: int
    ) -> list[float]:
        """Scores of the rows from `first_row` on, in one forward pass."""
        forest = self.forest
        width = max(map(len, suffixes))
        padded = [suffix + [0] * (width - len(suffix)) for suffix in suffixes]
        lengths = [len(suffix) - 1 for suffix in suffixes]
        tokens, last, tree = upload(forest.device, *map(torch.tensor, (padded, lengths, trees)))
        output: Any = forest.run_branches(
            forest.model.base_model, tokens, start=0, tree=tree, first_row=first_row
        )
        hidden = output.last_hidden_state
        pooled = hidden[torch.arange(len(suffixes), device=forest.device), last]
        return self._head(pooled)[:, self.reward.column].tolist()

    def _head(self, pooled: torch.Tensor) -> torch.Tensor:
        head = self.reward.model.score
        if _is_plain_linear(head):
            bias = None if head.bias is None else head.bias.float()
            return functional.linear(pooled.float(), head.weight.float(), bias)
        return head(pooled).float()


def _is_plain_linear(head: torch.nn.Module) -> bool:
    """Whether `head` is a linear layer as torch makes it: no hook, no quantised weight."""
    is_linear = type(head) is torch.nn.Linear and "forward" not in vars(head)
    has_hooks = bool(head._forward_hooks or head._forward_pre_hooks)
    return is_linear and not has_hooks and type(head.weight.data) is torch.Tensor


def is_causal_classifier(model: PreTrainedModel) -> bool:
    """Whether `model` is a causal backbone with a `score` head, as transformers builds them."""
    return isinstance(getattr(model, "score", None), torch.nn.Module) and hasattr(
        model, model.base_model_prefix
    )
