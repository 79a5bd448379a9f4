"""Whether prompts and their responses fit into the positions that models have."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from ..errors import InvalidArgument
from ..forest.language import max_positions
from ..prompts import Prompt
from .base import Reward
from .causal import ClassifierReward


def check_fits(
    idx: int,
    prompt: Prompt,
    num_new: int,
    settings: str,
    models: Mapping[str, PreTrainedModel | Reward | None],
) -> None:
    """Refuse a prompt that is too long, with what comes after it, for one of `models`.

    A reward with another tokenizer is only asked for the prompt: how many tokens of its own a
    response will be is not known.

    Args:
        idx: position of the prompt in the call.
        prompt: the prompt.
        num_new: tokens after the prompt, at most.
        settings: what `num_new` comes from, for the message.
        models: language models and rewards by role; a function has no limit, nor has None.

    Raises:
        InvalidArgument: the message names `prompts[idx]`, its length, the model and its limit; or
            the template of a reward that refuses the chat.
    """
    for role, given in models.items():
        model = given.model if isinstance(given, ClassifierReward) else given
        limit = max_positions(model) if isinstance(model, PreTrainedModel) else None
        if isinstance(given, ClassifierReward) and not given.shares_ids(prompt):
            # Encode it even where there is no limit: the reward's template may refuse the chat.
            try:
                num_tokens = len(given.encode(prompt, []))
            except InvalidArgument as error:
                raise InvalidArgument(f"prompts[{idx}], for the {role} model: {error}") from error
            if limit is not None and num_tokens > limit:
                raise InvalidArgument(
                    f"prompts[{idx}] has {num_tokens} tokens for the {role} model, which allows "
                    f"{limit}"
                )
            continue
        if limit is None:
            continue
        num_prompt = len(prompt.token_ids)
        if num_prompt + num_new > limit:
            raise InvalidArgument(
                f"prompts[{idx}] has {num_prompt} tokens; with {settings} that makes "
                f"{num_prompt + num_new}, but the {role} model allows {limit}"
            )
