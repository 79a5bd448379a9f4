"""A language model of transformers whose logits stand in a table, a row for each whole history.

The history reaches the model through attention alone: all scores are 0, so that a query gets the
mean of the values that it sees, and the values are one-hot in (position, token). A token too many,
too few or at a wrong position is an error, so that every forward pass tests the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.enumerable.world import Policy

# A prompt has two tokens, which are the number of its world in base V.
PROMPT_LEN = 2


class TableConfig(PreTrainedConfig):
    """The vocabulary size V and the number of positions, prompt and response together."""

    model_type = "table"

    def __init__(self, vocab_size: int = 4, max_positions: int = 8, **kwargs: object) -> None:
        self.vocab_size = vocab_size
        self.max_positions = max_positions
        super().__init__(**kwargs)


class TableModel(PreTrainedModel):
    """A model with logits `[V]` after every history of every one of V * V worlds."""

    config_class = TableConfig
    _supports_attention_backend = True

    def __init__(self, policy: Policy) -> None:
        vocab_size = policy[0].shape[-1]
        assert policy[0].shape[0] == vocab_size**PROMPT_LEN
        positions = PROMPT_LEN + len(policy)
        super().__init__(TableConfig(vocab_size, positions, attn_implementation="eager"))
        self.lm_head = torch.nn.Linear(vocab_size, vocab_size, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.eye(vocab_size))
        self.requires_grad_(False)
        # A row of zeros serves before the first response token and after the last.
        rows = [torch.zeros(1, vocab_size), *(table.flatten(0, 1) for table in policy)]
        self.register_buffer("rows", torch.cat(rows).float())
        sizes = [1, *(table.shape[0] * table.shape[1] for table in policy)]
        self.register_buffer("starts", torch.tensor(sizes).cumsum(0)[: len(policy)])
        self.eval()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: object,
        **kwargs: object,
    ) -> CausalLMOutput:
        vocab_size, num_positions = self.config.vocab_size, self.config.max_positions
        cells = position_ids * vocab_size + input_ids
        values = torch.nn.functional.one_hot(cells, num_positions * vocab_size).float()[:, None]
        keys = torch.zeros_like(values)
        keys, values = past_key_values.update(keys, values, 0)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        mean, _ = attend(self, torch.zeros_like(keys), keys, values, None, scaling=1.0)
        seen = mean.squeeze(2) * (position_ids[..., None] + 1)
        return CausalLMOutput(logits=self.lm_head(self.rows[self._row(seen, position_ids)]))

    def _row(self, seen: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return the row of the tables that stands after the history `seen` `[n, T, P * V]`."""
        vocab_size, num_positions = self.config.vocab_size, self.config.max_positions
        counts = seen.view(*seen.shape[:2], num_positions, vocab_size)
        past = torch.arange(num_positions) <= position_ids[..., None]
        assert torch.allclose(counts.sum(-1), past.float(), atol=1e-3), "not one token a position"
        assert torch.allclose(counts.amax(-1), past.float(), atol=1e-3), "two tokens at a position"
        number = torch.zeros_like(position_ids)
        for place in range(num_positions):
            digit = counts[:, :, place].argmax(-1)
            number = torch.where(past[..., place], number * vocab_size + digit, number)
        # `number` holds world and history: the tables are laid out by world, then by history.
        length = position_ids + 1 - PROMPT_LEN
        known = (length >= 0) & (length < len(self.starts))
        start = self.starts[length.clamp(0, len(self.starts) - 1)]
        return torch.where(known, start + number, 0)


def prompt_of(world: int, vocab_size: int) -> list[int]:
    """Return the prompt that stands for world number `world`."""
    return list(divmod(world, vocab_size))


def number_of(tokens: Sequence[int], vocab_size: int) -> int:
    """Return `tokens` as a number in base V."""
    number = 0
    for token in tokens:
        number = number * vocab_size + token
    return number
