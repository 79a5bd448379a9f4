"""`LanguageForest`: a causal language model of transformers over a forest of shared prefixes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from .. import ops
from ..errors import BackendRefused, UnsupportedModel
from . import ForestCache, SavedTokens
from .attention import running
from .cache import BranchPass, PrefillPass
from .few_rows import CpuLayers
from .head import LinearHead, linear_head
from .packing import split_by_length

# Logits that one scoring pass may hold, in bytes.
_LOGITS_BYTES = 256 << 20

# Bytes of KV that a token takes in models that ran over a forest.
_kv_bytes: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()


class Forest:
    """A model's backbone and its cache: positions, passes and counts, for any head.

    Attributes:
        cache: the KV of every tree and row.
        limit: positions that the model has, or None.
        num_token_forwards: tokens that went through the model so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_trees: int,
        num_rows: int,
        prefix_capacity: int,
        branch_capacity: int,
        backend: str | None,
        cpu_layers: bool = True,
    ) -> None:
        self.model = model
        self.backend = backend
        self.device = model.device
        self.limit = max_positions(model)
        self.cache = ForestCache(
            num_trees=num_trees,
            num_rows=num_rows,
            prefix_capacity=prefix_capacity,
            branch_capacity=branch_capacity,
        )
        self.num_token_forwards = 0
        self.cpu_layers = CpuLayers(model, backend) if cpu_layers else None

    @property
    def peak_kv_bytes(self) -> int:
        """Most bytes of KV held so far; buffers only ever grow."""
        return self.cache.num_bytes

    def run_prefill(
        self, module: PreTrainedModel, tree: int, token_ids: Sequence[int], **options: object
    ) -> object:
        """Append `token_ids` to the prefix of `tree` with `module`; return its output."""
        start = self.cache.prefix_len[tree]
        tokens = torch.tensor([token_ids], device=self.device)
        positions = torch.arange(start, start + len(token_ids), device=self.device)[None]
        output = self._run(module, tokens, positions, PrefillPass(tree, start), options)
        self.cache.prefix_len[tree] = start + len(token_ids)
        return output

    def run_branches(
        self,
        module: PreTrainedModel,
        tokens: torch.Tensor,
        *,
        start: int,
        tree: torch.Tensor | None,
        first_row: int = 0,
        **options: object,
    ) -> object:
        """Push `tokens` `[n, T]` through n rows, which hold `start` tokens already.

        `tree` is the tree of each row (int64 `[n]`, ascending); None: n is a multiple of G and row
        i belongs to tree `i // (n // G)`.
        """
        num_rows, num_tokens = tokens.shape
        branch_pass = self.cache.branch_pass(
            num_rows=num_rows,
            start=start,
            num_tokens=num_tokens,
            tree=tree,
            device=self.device,
            first_row=first_row,
        )
        prefix_len = branch_pass.prefix_len
        if tree is None:
            first = prefix_len.repeat_interleave(num_rows // self.cache.num_trees)
        else:
            first = prefix_len[tree]
        positions = first[:, None] + torch.arange(start, start + num_tokens, device=self.device)
        if num_tokens > 1 and self.limit is not None:
            # What pads a short row to the length of a long one may lie beyond the last position.
            positions.clamp_(max=self.limit - 1)
        return self._run(module, tokens, positions, branch_pass, options)

    def _run(
        self,
        module: PreTrainedModel,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        forward_pass: PrefillPass | BranchPass,
        options: dict[str, object],
    ) -> object:
        self.num_token_forwards += tokens.numel()
        with (
            running(module, self.cache, forward_pass, self.backend),
            self.cpu_layers.during(tokens.numel()) if self.cpu_layers else contextlib.nullcontext(),
        ):
            return module(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                **options,
            )


class LanguageForest(Forest):
    """Next-token logits after the prefixes of G trees and after N rows.

    Attributes:
        next_logits: logits `[G, V]` of the token after each tree's prefix.
    """

    def __init__(self, model: PreTrainedModel, **sizes: object) -> None:
        check_runs(model)
        super().__init__(model, **sizes)
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self.next_logits = torch.empty(
            self.cache.num_trees, self.vocab_size, dtype=model.dtype, device=self.device
        )

    def prefill(self, tree: int, token_ids: Sequence[int]) -> None:
        """Encode what is left of the prompt of `tree`; its next_logits is ready afterwards."""
        output = self.run_prefill(self.model, tree, token_ids, **self._last_only)
        self.next_logits[tree] = output.logits[0, -1]

    def forward_rows(
        self, tokens: torch.Tensor, *, start: int, tree: torch.Tensor | None
    ) -> torch.Tensor:
        """Push one token a row (int64 `[n]`); return the logits `[n, V]` after it."""
        output = self.run_branches(
            self.model, tokens[:, None], start=start, tree=tree, **self._last_only
        )
        return output.logits[:, -1]

    def forward_depth(
        self,
        tokens: torch.Tensor,
        *,
        depth: torch.Tensor,
        tree: torch.Tensor,
        prefix_len: torch.Tensor,
    ) -> torch.Tensor:
        """`forward_rows` for what only the device knows, at fixed addresses; the host never waits.

        Args:
            tokens: int64 `[n, 1]`.
            depth: int64 `[1]`, tokens that the rows hold already.
            tree: int64 `[n]`, ascending, the tree of each row.
            prefix_len: int64 `[G]`.
        """
        now = self.cache.depth_pass(depth=depth, tree=tree, prefix_len=prefix_len)
        positions = (prefix_len.index_select(0, tree) + depth)[:, None]
        output = self._run(self.model, tokens, positions, now, self._last_only)
        return output.logits[:, -1]

    def score_rows(
        self, rows: Sequence[Sequence[int]], trees: Sequence[int], *, vocab_size: int
    ) -> list[float]:
        """Sum of log p of every token of `rows[i]` but its first, after the prefix of `trees[i]`.

        Natural log; ids from `vocab_size` on do not take part. Where the head is a matrix, the
        logits are never whole, and fp32 from the product onward; else they are the model's own.
        """
        lengths = [len(row) - 1 for row in rows]
        self.cache.reserve(prefix_capacity=0, branch_capacity=max(lengths))
        head = linear_head(self.model)
        per_pass = self.cache.num_rows
        if head is None:
            fitting = _LOGITS_BYTES // (4 * self.vocab_size * max(lengths))
            per_pass = min(per_pass, max(1, fitting))
        sums = [0.0] * len(rows)
        for chunk in split_by_length(lengths, device_type=self.device.type, max_rows=per_pass):
            width = max(lengths[i] for i in chunk)
            tokens = torch.tensor(
                [[*rows[i], *[0] * (width - lengths[i])] for i in chunk], device=self.device
            )
            used = torch.tensor([lengths[i] for i in chunk], device=self.device)
            tree = torch.tensor([trees[i] for i in chunk], device=self.device)
            found = self._score_pass(head, tokens, used, tree, vocab_size)
            for i, logprob in zip(chunk, found.tolist(), strict=True):
                sums[i] = logprob
        return sums

    def _score_pass(
        self,
        head: LinearHead | None,
        tokens: torch.Tensor,
        lengths: torch.Tensor,
        tree: torch.Tensor,
        vocab_size: int,
    ) -> torch.Tensor:
        """The sums `[n]` of rows `[n, 1 + T]`, of which `lengths` `[n]` tokens count."""
        module = self.model if head is None else head.backbone
        output = self.run_branches(module, tokens[:, :-1], start=0, tree=tree)
        if head is not None:
            return ops.linear_trajectory_logprob(
                output.last_hidden_state,
                head.weight,
                tokens[:, 1:],
                lengths,
                bias=head.bias,
                scale=head.scale,
                softcap=head.softcap,
                vocab_size=vocab_size,
                backend=self.backend,
            )
        logprobs = output.logits[..., :vocab_size].float().log_softmax(-1)
        picked = logprobs.gather(2, tokens[:, 1:, None]).squeeze(2)
        used = torch.arange(picked.shape[1], device=self.device) < lengths[:, None]
        return torch.where(used, picked, 0.0).sum(1)

    def commit(
        self,
        trees: Sequence[int],
        rows: Sequence[int],
        next_logits: torch.Tensor,
        saved: SavedTokens | None = None,
    ) -> None:
        """Move the first token of `rows[i]` into the prefix of `trees[i]`.

        `next_logits[i]` follow it.

        Its KV is read from `saved`, where that is given.
        """
        self.cache.commit(trees, rows, saved=saved)
        self.next_logits[torch.tensor(trees, device=self.device)] = next_logits

    def advance(self, trees: Sequence[int], tokens: Sequence[int]) -> None:
        """Append `tokens[i]` to the prefix of `trees[i]` (ascending) by one forward pass."""
        tree = None if len(trees) == self.cache.num_trees else torch.tensor(trees)
        ids = torch.tensor(tokens, device=self.device)
        next_logits = self.forward_rows(
            ids, start=0, tree=tree if tree is None else tree.to(self.device)
        )
        self.commit(trees, range(len(trees)), next_logits)

    def drop_tree(self, tree: int) -> None:
        """Take `tree` out; the last tree takes over its place."""
        last = self.cache.num_trees - 1
        self.cache.drop_tree(tree)
        self.next_logits[tree] = self.next_logits[last]
        self.next_logits = self.next_logits[:last]

    @functools.cached_property
    def _last_only(self) -> dict[str, object]:
        """What asks the model for the logits of the last token alone."""
        takes = inspect.signature(self.model.forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


def check_supported(model: PreTrainedModel, role: str) -> None:
    """Refuse a model that the forest cannot run, by its configuration; `check_runs` tries it.

    Raises:
        UnsupportedModel: the message names the role, the model type and the feature.
    """
    config = model.config.get_text_config()
    name = f"{role}: model type {model.config.model_type!r}"
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"{name} is an encoder-decoder; a decoder-only model is needed")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModel(
            f"{name} does not use the attention interface of transformers, through which the "
            "shared-prefix cache works"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        raise UnsupportedModel(
            f"{name} has layers of kind {', '.join(sorted(kinds))}; only full_attention and "
            "sliding_attention are honoured"
        )
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModel(f"{name} attends in both directions (use_bidirectional_attention)")
    if getattr(config, "is_decoder", True) is False and hasattr(config, "type_vocab_size"):
        raise UnsupportedModel(f"{name} is an encoder (is_decoder=False)")


@torch.no_grad()
def check_runs(model: PreTrainedModel) -> int:
    """Push three tokens through a forest of one tree: what it does not honour shows at once.

    A model that ran once is not tried again. Returns the bytes of KV that a token takes.

    Raises:
        UnsupportedModel: the message names the model type and the feature.
    """
    if model in _kv_bytes:
        return _kv_bytes[model]
    forest = Forest(
        model, num_trees=1, num_rows=1, prefix_capacity=2, branch_capacity=1, backend=None
    )
    is_language_model = model.get_output_embeddings() is not None
    module = model if is_language_model else getattr(model, model.base_model_prefix)
    try:
        forest.run_prefill(module, 0, [0, 0])
        token = torch.zeros(1, 1, dtype=torch.int64, device=forest.device)
        forest.run_branches(module, token, start=0, tree=None)
    except (torch.OutOfMemoryError, BackendRefused):
        raise
    except Exception as error:
        # Whatever the model's own code makes of a cache that it does not expect.
        raise UnsupportedModel(
            f"model type {model.config.model_type!r} does not run over the shared-prefix cache: "
            f"{error}"
        ) from error
    _kv_bytes[model] = forest.cache.num_bytes // 3
    return _kv_bytes[model]


def max_positions(model: PreTrainedModel) -> int | None:
    """Longest sequence the model was made for, or None where its config does not say.

    With "longrope" that is the original length: beyond it every position is rotated by other
    angles, those before it too, so that a prefix would have to be encoded again.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return getattr(config, "max_position_embeddings", None)
