"""The models and rewards of a session, loaded by role."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..config import Role
from ..errors import InvalidArgument
from ..models.generation import warn_of_ignored
from ..models.loading import (
    ModelLike,
    check_same_vocabulary,
    load_language_model,
    load_reward,
    load_tokenizer,
    num_token_ids,
)
from ..models.options import LoadingOptions, place_models
from ..models.served import LanguageModel, ServedModel, is_local, vocabulary_size
from ..models.shared_weights import Loader
from ..rewards.base import Reward, RewardFunction, Texts
from ..servers import Server


@dataclasses.dataclass(frozen=True)
class LoadedModels:
    """What `load_models` returns.

    Attributes:
        languages: language models by role.
        rewards: rewards by role.
        tokenizer: the first language model's.
        vocab_size: number of ids that every language model embeds and predicts.
        num_tokens: number of ids that may be chosen.
    """

    languages: dict[Role, LanguageModel]
    rewards: dict[str, Reward]
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    num_tokens: int


def load_models(
    languages: Mapping[Role, ModelLike | None],
    rewards: Mapping[str, ModelLike | RewardFunction | None],
    loading: LoadingOptions,
) -> LoadedModels:
    """Load what takes part; the arguments and errors are those of `Session`."""
    given = {role: model for role, model in languages.items() if model is not None}
    given_rewards = {role: reward for role, reward in rewards.items() if reward is not None}
    sources: dict[str, Any] = {str(role): model for role, model in given.items()} | given_rewards
    places = {role: place_models(loading.device, role) for role in sources}
    model_kwargs = loading.model_kwargs or {}
    for role in model_kwargs:
        if role in sources and not isinstance(sources[role], (str, os.PathLike)):
            raise InvalidArgument(
                f"model_kwargs of {role} cannot be honoured: {role} is loaded already"
            )
    loader = Loader(sources, devices=places, dtype=loading.dtype, model_kwargs=model_kwargs)
    loaded = _load_languages(given, places, loading, loader)
    warn_of_ignored({role: model for role, model in loaded.items() if is_local(model)})
    tokenizers = _load_tokenizers(given, loaded, loading, loader)
    sizes = [vocabulary_size(model) for model in loaded.values()]
    known = [num_token_ids(tokenizer) for tokenizer in tokenizers if tokenizer is not None]
    return LoadedModels(
        languages=loaded,
        rewards=_load_rewards(
            given_rewards, places, loading, loader, Texts(tokenizers[0]), vocab_size=sizes[0]
        ),
        tokenizer=tokenizers[0],
        vocab_size=min(sizes),
        # Prompts may have any id that all models embed; what is chosen is a token to everybody.
        num_tokens=min([*sizes, *known]),
    )


def _load_languages(
    given: Mapping[Role, ModelLike],
    places: Mapping[str, torch.device],
    loading: LoadingOptions,
    loader: Loader,
) -> dict[Role, LanguageModel]:
    """Return the language models by role; a server that is named twice is opened once."""
    languages: dict[Role, LanguageModel] = {}
    served: dict[Server, ServedModel] = {}
    for role, model in given.items():
        server = Server.named(model, loader.options_of(role))
        if server is None:
            languages[role] = load_language_model(
                model, role, device=places[role], dtype=loading.dtype, loader=loader
            )
            continue
        if server not in served:
            served[server] = ServedModel(server, role, loading.tokenizer)
        languages[role] = served[server]
    return languages


def _load_tokenizers(
    given: Mapping[Role, ModelLike],
    languages: Mapping[Role, LanguageModel],
    loading: LoadingOptions,
    loader: Loader,
) -> list[PreTrainedTokenizerBase | None]:
    """Return the tokenizers of the language models, in their order, of one vocabulary."""
    found: list[PreTrainedTokenizerBase | None] = []
    first = next(iter(given))
    for role, model in languages.items():
        source = loading.tokenizer if role == first else None
        if source is None and isinstance(model, ServedModel):
            tokenizer = model.tokenizer
        else:
            beside = None if isinstance(model, ServedModel) else given[role]
            name = "tokenizer" if role == first else role
            tokenizer = load_tokenizer(source, beside, name, loader.options_of(role))
        if role != first:
            check_same_vocabulary(
                role,
                (found[0], tokenizer),
                (languages[first], model),
                is_given=loading.tokenizer is not None,
            )
        found.append(tokenizer)
    return found


def _load_rewards(
    given: Mapping[str, ModelLike | RewardFunction],
    places: Mapping[str, torch.device],
    loading: LoadingOptions,
    loader: Loader,
    texts: Texts,
    *,
    vocab_size: int,
) -> dict[str, Reward]:
    """Return the rewards by role; one that is given as both is loaded once."""
    is_one = (
        {"reward", "baseline_reward"} <= given.keys()
        and _is_same(given["reward"], given["baseline_reward"])
        and _is_same(loading.reward_tokenizer, loading.baseline_reward_tokenizer)
        and loader.options_of("reward") == loader.options_of("baseline_reward")
        and places["reward"] == places["baseline_reward"]
        # These are of the target reward alone.
        and loading.reward_index is None
        and loading.reward_options is None
    )
    rewards = {
        role: load_reward(
            reward,
            role,
            tokenizer=getattr(loading, f"{role}_tokenizer"),
            label=loading.reward_index if role == "reward" else None,
            options=loading.reward_options if role == "reward" else None,
            texts=texts,
            vocab_size=vocab_size,
            device=places[role],
            dtype=loading.dtype,
            loader=loader,
        )
        for role, reward in given.items()
        if role == "reward" or not is_one
    }
    if is_one:
        rewards["baseline_reward"] = rewards["reward"]
    return rewards


def _is_same(first: Any, second: Any) -> bool:
    """Whether two arguments are one object, or one name."""
    return first is second or (isinstance(first, (str, os.PathLike)) and first == second)
