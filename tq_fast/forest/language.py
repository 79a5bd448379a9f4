"""`LanguageForest`: a causal language model of transformers over a forest of shared prefixes."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..copies import upload
from ..errors import UnsupportedModel
from . import ForestCache, SavedTokens, share_prefix
from .attention import attending, running
from .cache import BranchPass, LayerShapes, PrefillPass
from .cpu_layers import CpuLayers
from .experts import QuietExperts
from .graphs import PassGraphs, has_graphs
from .head_input import HeadInput
from .huge_pages import gather_weights
from .view import cache_argument, takes

# What the layers of a model keep of a token, for models that ran over a forest before.
known_shapes: weakref.WeakKeyDictionary[PreTrainedModel, LayerShapes] = weakref.WeakKeyDictionary()


class Forest:
    """A model's backbone and its cache: positions, passes and counts, for any head.

    Args:
        model: a causal model of transformers.
        num_trees, num_rows, prefix_capacity, branch_capacity: those of the cache.
        backend: which backend the ops use.
        cpu_layers: whether layers run fused where the model is on a CPU.
        graphs: whether passes over branches run as CUDA graphs where it is on a GPU.
        compiled_modules: whether norms, MLPs and rotary embeddings run compiled.

    Attributes:
        source: the model as the user has it; nothing of it is changed.
        model: the forest's own view of it, which attends through the cache.
        device: where the model computes.
        cache: the KV of every tree and row.
        limit: positions that the model has, or None.
        num_token_forwards: tokens that went through the model so far.
        graphs: of passes over branches; None where there are none.
        refuses_graphs: whether a step over this forest could not be captured.
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
        graphs: bool = False,
        compiled_modules: bool = False,
    ) -> None:
        self.source = model
        self.model = attending(model)
        self.backend = backend
        self.device = device_of(model)
        self.limit = max_positions(model)
        self.cache = ForestCache(
            num_trees=num_trees,
            num_rows=num_rows,
            prefix_capacity=prefix_capacity,
            branch_capacity=branch_capacity,
            shapes=known_shapes.get(model),
        )
        self.num_token_forwards = 0
        has_layers = cpu_layers and self.device.type == "cpu"
        if has_layers:
            gather_weights(model)
        self.cpu_layers = CpuLayers(self.model, model, backend) if has_layers else None
        if compiled_modules:
            # This imports torch._dynamo, which takes a second.
            from .compiled_modules import compile_modules

            taken = self.cpu_layers.taken if self.cpu_layers is not None else frozenset()
            compile_modules(self.model, model, taken)
        self.refuses_graphs = False
        self.graphs = PassGraphs(self) if graphs and has_graphs(self.device) else None
        self._experts = QuietExperts(self.model)
        self._head_input: HeadInput | None = None
        self._cache_argument = cache_argument(model)

    @property
    def peak_kv_bytes(self) -> int:
        """Most bytes of KV held so far; buffers only ever grow."""
        return self.cache.num_bytes

    def fits(self, *sizes: int) -> bool:
        """Whether the buffers hold as many trees, rows, prefix tokens and branch tokens."""
        return self.cache.fits(*sizes)

    def begin(self, num_trees: int) -> None:
        """Hold that many empty trees, as a new forest would."""
        self.cache.begin(num_trees)
        self.num_token_forwards = 0

    def run_prefill(
        self, module: PreTrainedModel, tree: int, token_ids: Sequence[int], **options: Any
    ) -> Any:
        """Append `token_ids` to the prefix of `tree` with `module`; return its output."""
        start = self.cache.prefix_len[tree]
        (tokens,) = upload(self.device, torch.tensor([token_ids]))
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
        tree: torch.Tensor,
        first_row: int = 0,
        **options: Any,
    ) -> Any:
        """Push `tokens` `[n, T]` through n rows, which hold `start` tokens already.

        `tree` is the tree of each row, int64 `[n]`, ascending. What is returned is valid until the
        next pass: the graph of a pass writes to the same memory each time.
        """
        if self.graphs is not None:
            output = self.graphs.run(
                module, tokens, start=start, tree=tree, first_row=first_row, **options
            )
            if output is not None:
                return output
        num_tokens = tokens.shape[1]
        branch_pass = self.cache.branch_pass(
            tree=tree, start=start, num_tokens=num_tokens, first_row=first_row
        )
        first = branch_pass.prefix_len[tree][:, None]
        positions = first + torch.arange(start, start + num_tokens, device=self.device)
        if num_tokens > 1 and self.limit is not None:
            # The padding of a short row may reach beyond the model's last position.
            positions.clamp_(max=self.limit - 1)
        return self._run(module, tokens, positions, branch_pass, options)

    def run_fixed(
        self,
        module: PreTrainedModel,
        tokens: torch.Tensor,
        *,
        where: torch.Tensor,
        tree: torch.Tensor,
        lengths: torch.Tensor,
        first_row: int = 0,
        **options: Any,
    ) -> Any:
        """`run_branches` at fixed addresses, over tokens whose places only the device knows.

        The host does not wait for the device.

        Args:
            module: the model, or its backbone.
            tokens: int64 `[n, T]`.
            where: int64 `[T]`, places of the tokens in their branches, one behind the other.
            tree: int64 `[n]`, ascending, the tree of each row.
            lengths: what the cache's `lengths_on` returned.
            first_row: of the rows.
        """
        now = self.cache.fixed_pass(where=where, tree=tree, lengths=lengths, first_row=first_row)
        positions = lengths.index_select(0, tree)[:, None] + where
        if tokens.shape[1] > 1 and self.limit is not None:
            positions.clamp_(max=self.limit - 1)
        with self._experts.running(tokens.numel()):
            return self._run(module, tokens, positions, now, options)

    @property
    def hidden(self) -> torch.Tensor | None:
        """The states `[n, T, D]` that the LM head read last; None where they are not kept."""
        return None if self._head_input is None else self._head_input.states

    @hidden.setter
    def hidden(self, states: torch.Tensor) -> None:
        assert self._head_input is not None, "nobody keeps the states of this forest"
        self._head_input.states = states

    def prefill(self, tree: int, token_ids: Sequence[int]) -> None:
        """Encode what is left of the prompt of `tree`; what follows it is ready afterwards."""
        raise NotImplementedError

    def advance(self, trees: Sequence[int], tokens: Sequence[int]) -> None:
        """Append `tokens[i]` to the prefix of `trees[i]` (ascending) by one forward pass."""
        raise NotImplementedError

    def copy_tree(self, source: int, tree: int) -> None:
        """Let `tree`, which is empty, have the prefix of `source` and what is ready after it."""
        self.cache.copy_prefix(source, tree, self.cache.prefix_len[source])

    def encode(
        self, trees: Iterable[int], texts: Sequence[list[int]], *, shares: bool = True
    ) -> None:
        """Encode `texts[tree]` for each of `trees`, whose prefixes are empty.

        Args:
            trees: the trees.
            texts: of every tree of the forest.
            shares: what a text has in common with a prefix that is there is copied.
        """
        encoded: list[int] = []
        for tree in trees:
            twins = (other for other in encoded if texts[other] == texts[tree])
            twin = next(twins, None) if shares else None
            if twin is not None:
                self.copy_tree(twin, tree)
            else:
                # Leave the last token to be encoded: its logits are the next-token logits.
                known = share_prefix(self.cache, tree, texts[tree][:-1], texts) if shares else 0
                self.prefill(tree, texts[tree][known:])
            encoded.append(tree)

    def seek(self, trees: Sequence[int], texts: Sequence[Sequence[int]]) -> None:
        """Set the prefixes of `trees` (ascending) to `texts`, of which the cache holds the KV.

        The last token of each is encoded again, because its logits were not kept.
        """
        for tree, text in zip(trees, texts, strict=True):
            self.cache.prefix_len[tree] = len(text) - 1
        self.advance(trees, [text[-1] for text in texts])

    def _run(
        self,
        module: PreTrainedModel,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        forward_pass: PrefillPass | BranchPass,
        options: dict[str, Any],
    ) -> Any:
        self.num_token_forwards += tokens.numel()
        if self.cpu_layers is not None:
            self.cpu_layers.install(tokens.numel())
        with running(self.cache, forward_pass, self.backend):
            return module(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                return_dict=True,
                **{self._cache_argument: self.cache},
                **options,
            )


class LanguageForest(Forest):
    """Next-token logits after the prefixes of G trees and after N rows.

    Args:
        model: a causal language model.
        keeps_hidden: whether the states that the LM head reads are kept beside the logits.
        **sizes: those of `Forest`.

    Attributes:
        next_logits: logits `[G, V]` of the token after each tree's prefix.
        next_hidden: the states `[G, D]` that they come from; None where they are not kept.
        hidden: the states `[n, T, D]` of the last pass, likewise.

    Raises:
        UnsupportedModel: states are to be kept, and the model has no LM head to take them from.
    """

    def __init__(self, model: PreTrainedModel, *, keeps_hidden: bool = False, **sizes: Any) -> None:
        super().__init__(model, **sizes)
        self.vocab_size = vocab_size_of(model)
        self.next_logits = self._no_logits()
        self.next_hidden: torch.Tensor | None = None
        if keeps_hidden:
            self._head_input = self._watch_head()

    def begin(self, num_trees: int) -> None:
        super().begin(num_trees)
        self.next_logits, self.next_hidden = self._no_logits(), None

    def prefill(self, tree: int, token_ids: Sequence[int]) -> None:
        """Encode what is left of the prompt of `tree`; its next_logits is ready afterwards."""
        output = self.run_prefill(self.model, tree, token_ids, **self._last_only)
        logits = output.logits[0, -1]
        # Some models have their logits in another dtype than their weights.
        self.next_logits = self.next_logits.to(logits.dtype)
        self.next_logits[tree] = logits
        if self.hidden is not None:
            self._keep_hidden(tree, self.hidden[0, -1])

    def forward_rows(self, tokens: torch.Tensor, *, start: int, tree: torch.Tensor) -> torch.Tensor:
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
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """`forward_rows` at fixed addresses and a depth that only the device knows.

        Args:
            tokens: int64 `[n, 1]`.
            depth: int64 `[1]`, tokens that the rows hold already.
            tree: int64 `[n]`, ascending, the tree of each row.
            lengths: what the cache's `lengths_on` returned.
        """
        output = self.run_fixed(
            self.model, tokens, where=depth, tree=tree, lengths=lengths, **self._last_only
        )
        return output.logits[:, -1]

    def commit(
        self,
        trees: Sequence[int],
        rows: Sequence[int],
        logits: torch.Tensor,
        saved: SavedTokens | None = None,
    ) -> None:
        """Move the first token of `rows[i]` into the prefix of `trees[i]`.

        `logits` `[R, V]` are those after the first token of every row. Its KV is read from `saved`,
        where that is given.
        """
        tree, row = upload(self.device, torch.tensor(trees), torch.tensor(rows))
        self.cache.commit(trees, tree, row, saved)
        self.next_logits[tree] = logits[row]

    def advance(self, trees: Sequence[int], tokens: Sequence[int]) -> None:
        """Append `tokens[i]` to the prefix of `trees[i]` (ascending) by one forward pass."""
        tree, ids = upload(self.device, torch.tensor(trees), torch.tensor(tokens))
        logits = self.forward_rows(ids, start=0, tree=tree)
        self.cache.commit(trees, tree, torch.arange(len(trees), device=self.device))
        self.next_logits[tree] = logits
        if self.hidden is not None:
            self._keep_hidden(tree, self.hidden[:, -1])

    def copy_tree(self, source: int, tree: int) -> None:
        super().copy_tree(source, tree)
        self.next_logits[tree] = self.next_logits[source]
        if self.next_hidden is not None:
            self.next_hidden[tree] = self.next_hidden[source]

    def drop_tree(self, tree: int) -> None:
        """Take `tree` out; the last tree takes over its place."""
        last = self.cache.num_trees - 1
        self.cache.drop_tree(tree)
        self.next_logits[tree] = self.next_logits[last]
        self.next_logits = self.next_logits[:last]

    def _watch_head(self) -> HeadInput:
        """Keep what the LM head of the view reads, pass for pass."""
        head = self.model.get_output_embeddings()
        if head is None:
            raise UnsupportedModel(
                f"{type(self.source).__name__} has no LM head whose input a value head could read"
            )
        # The view shares its dicts of hooks with the model, which must not get this one.
        vars(head)["_forward_pre_hooks"] = OrderedDict(head._forward_pre_hooks)
        watched = HeadInput()
        head.register_forward_pre_hook(watched)
        return watched

    def _keep_hidden(self, tree: int | torch.Tensor, hidden: torch.Tensor) -> None:
        """`hidden` are the states after the prefix of `tree`, or of several (int64 `[n]`)."""
        if self.next_hidden is None:
            self.next_hidden = hidden.new_zeros(len(self.next_logits), hidden.shape[-1])
        self.next_hidden[tree] = hidden

    def _no_logits(self) -> torch.Tensor:
        return torch.empty(
            self.cache.num_trees, self.vocab_size, dtype=self.source.dtype, device=self.device
        )

    @functools.cached_property
    def _last_only(self) -> dict[str, Any]:
        """Options that ask the model for the logits of the last token alone."""
        return {"logits_to_keep": 1} if takes(self.source, "logits_to_keep") else {}


class StateForest(Forest):
    """The last hidden states of a backbone after the prefixes of G trees and after N rows.

    Args:
        model: a model with a causal backbone, such as a causal sequence classifier.
        **sizes: those of `Forest`.

    Attributes:
        next_hidden: the states `[G, D]` after each tree's prefix.
    """

    def __init__(self, model: PreTrainedModel, **sizes: Any) -> None:
        super().__init__(model, **sizes)
        self.next_hidden = self._no_states()

    def begin(self, num_trees: int) -> None:
        super().begin(num_trees)
        self.next_hidden = self._no_states()

    def prefill(self, tree: int, token_ids: Sequence[int]) -> None:
        """Encode what is left of the prompt of `tree`; its next_hidden is ready afterwards."""
        output = self.run_prefill(self.model.base_model, tree, token_ids)
        self.next_hidden[tree] = output.last_hidden_state[0, -1]

    def forward_rows(self, tokens: torch.Tensor, *, start: int, tree: torch.Tensor) -> torch.Tensor:
        """Push tokens `[n, T]` through n rows; return the states `[n, T, D]` after each."""
        output = self.run_branches(self.model.base_model, tokens, start=start, tree=tree)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def forward_depth(
        self,
        tokens: torch.Tensor,
        *,
        depth: torch.Tensor,
        tree: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """The states `[n, D]` after `tokens` `[n, 1]`, as `LanguageForest.forward_depth` runs."""
        output = self.run_fixed(
            self.model.base_model, tokens, where=depth, tree=tree, lengths=lengths
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden[:, -1]

    def _no_states(self) -> torch.Tensor:
        size = self.source.config.get_text_config().hidden_size
        return torch.empty(self.cache.num_trees, size, dtype=self.source.dtype, device=self.device)

    def advance(self, trees: Sequence[int], tokens: Sequence[int]) -> None:
        tree, ids = upload(self.device, torch.tensor(trees), torch.tensor(tokens))
        hidden = self.forward_rows(ids[:, None], start=0, tree=tree)
        self.cache.commit(trees, tree, torch.arange(len(trees), device=self.device))
        self.next_hidden[tree] = hidden[:, -1]

    def copy_tree(self, source: int, tree: int) -> None:
        super().copy_tree(source, tree)
        self.next_hidden[tree] = self.next_hidden[source]


def device_of(model: torch.nn.Module) -> torch.device:
    """Return where `model` computes: weights that are offloaded lie elsewhere between passes."""
    for module in model.modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.empty(0, device=place).device
    places = [weight.device for weight in model.parameters()]
    real = (place for place in places if place.type != "meta")
    return next(real, places[0] if places else torch.device("cpu"))


def vocab_size_of(model: PreTrainedModel) -> int:
    """Return how many logits a token of `model` has, padding of the vocabulary included."""
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "out_features", None), int):
        return int(head.out_features)
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor):
        return int(weight.shape[0])
    return int(model.config.get_text_config().vocab_size)


def num_embedded(model: PreTrainedModel) -> int:
    """Return how many token ids `model` reads, padding of the vocabulary included."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return int(weight.shape[0])
    # A packed embedding may have no weight, or one of another shape.
    return int(model.config.get_text_config().vocab_size)


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
