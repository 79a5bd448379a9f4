"""Whether a prompt and its response fit into the positions that a model has."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InvalidArgument
from ..forest.language import max_positions

# Tokenizers that know no limit say a number beyond any model.
_NO_LIMIT = 10**8


def check_room(
    idx: int,
    num_prompt: int,
    num_new: int,
    settings: str,
    *,
    role: str,
    limit: int | None,
    hint: str = "",
) -> None:
    """Refuse a prompt that is too long, with what comes after it, for a model.

    Args:
        idx: position of the prompt in the call.
        num_prompt: its tokens.
        num_new: tokens after the prompt, at most.
        settings: what `num_new` comes from, for the message.
        role: the model's role.
        limit: positions of the model; None: it has no limit.
        hint: a way out, for the end of the message.

    Raises:
        InvalidArgument: the message names `prompts[idx]`, its length, the model and its limit.
    """
    if limit is not None and num_prompt + num_new > limit:
        raise InvalidArgument(
            f"prompts[{idx}] has {num_prompt} tokens; with {settings} that makes "
            f"{num_prompt + num_new}, but the {role} model allows {limit}{hint}"
        )


def positions_of(model: torch.nn.Module) -> int | None:
    """Tokens that `model` reads, at most; None where nothing says."""
    return max_positions(model) if isinstance(model, PreTrainedModel) else None


def positions_of_encoder(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None
) -> int | None:
    """Likewise, by what its tokenizer says too: some models count positions from 2."""
    known = [positions_of(model), getattr(tokenizer, "model_max_length", None)]
    limits = [int(limit) for limit in known if limit is not None and limit < _NO_LIMIT]
    return min(limits, default=None)
