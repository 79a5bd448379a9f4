"""The models of an evaluation, each loaded once, however many methods use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InvalidArgument, TqFastError
from ..models.loading import load_language_model, load_reward, load_tokenizer
from ..models.tiny import baseline_gold_reward, gold_reward, load_tiny_world
from ..prompts import Prompt
from ..rewards.base import Opening, Reward, Texts
from .config import Models, ModelSource
from .embedding import Embedder, load_embedder
from .keys import nearest
from .shift import sparsify_reward

_FUNCTIONS = {"gold_reward": gold_reward, "baseline_gold_reward": baseline_gold_reward}
_FOLDERS = ("sft", "baseline", "reward", "baseline_reward")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LoadedModels:
    """The models of one method or set-up.

    Attributes:
        languages: loaded language models by role ("baseline", "sft").
        rewards: rewards by role ("reward", "baseline_reward", "gold", "judge").
        tokenizer: the language models'.
        embedder: sentence embeddings, or None.
    """

    languages: dict[str, PreTrainedModel]
    rewards: dict[str, Reward]
    tokenizer: PreTrainedTokenizerBase | None
    embedder: Embedder | None

    def preset_arguments(self) -> dict[str, Any]:
        """The models as keyword arguments of a preset."""
        arguments: dict[str, Any] = {**self.languages, "tokenizer": self.tokenizer}
        for role in ("reward", "baseline_reward"):
            reward = self.rewards.get(role)
            if reward is not None:
                arguments |= {role: reward.source, f"{role}_tokenizer": reward.tokenizer}
                if role == "reward":
                    arguments["reward_index"] = reward.label
        return arguments

    @torch.no_grad()
    def score(
        self, role: str, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]
    ) -> list[float]:
        """Scores of whole responses (new token ids) under a reward."""
        longest = max(map(len, responses))
        session = self.rewards[role].open(
            Opening(prompts, len(prompts), max_new=longest, backend=None)
        )
        return [float(score) for score in session.score(range(len(prompts)), responses)]


class ModelPool:
    """Loads models on demand and keeps them."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def load(self, models: Models) -> LoadedModels:
        """Return everything that `models` names.

        Raises:
            InvalidArgument: a name, a device or a dtype is wrong, or nothing can be loaded there.
            UnsupportedModel: an architecture that the forest does not honour.
        """
        place, dtype = _place(models), _dtype(models)
        names = {role: str(models[role].name) for role in ("baseline", "sft") if role in models}
        languages = {}
        for role, name in names.items():
            languages[role] = self._keep(
                ("language", name, place, dtype),
                lambda name=name, role=role: load_language_model(
                    _path(name, role), role, device=place, dtype=dtype
                ),
            )
        main = names.get("baseline", names.get("sft"))
        given = models.get("tokenizer")
        tokenizer = None
        if main is not None:
            tokenizer = self._keep(
                ("tokenizer", main, given),
                lambda: load_tokenizer(given, _path(main, "tokenizer"), "tokenizer"),
            )
        vocab_size = 0
        if languages:
            first = next(iter(languages.values()))
            vocab_size = first.get_output_embeddings().weight.shape[0]
        rewards = {}
        for role in ("reward", "baseline_reward", "gold", "judge"):
            source = models.get(role)
            if isinstance(source, ModelSource):
                loading = {
                    "tokenizer": models.get(f"{role}_tokenizer"),
                    "label": models.get("reward_index") if role == "reward" else None,
                    "texts": Texts(tokenizer),
                    "vocab_size": vocab_size,
                    "device": place,
                    "dtype": dtype,
                }
                key = ("reward", source, main, place, *(loading[k] for k in ("tokenizer", "label")))
                rewards[role] = self._keep(
                    key, lambda s=source, r=role, o=loading: _reward(s, r, o)
                )
        return LoadedModels(languages, rewards, tokenizer, self._embedder(models, place))

    def _embedder(self, models: Models, place: torch.device) -> Embedder | None:
        source = models.get("embedder")
        if not isinstance(source, ModelSource):
            return None
        return self._keep(("embedder", source), lambda: load_embedder(source.name, place))

    def _keep(self, key: Any, load: Any) -> Any:
        if key not in self._kept:
            self._kept[key] = load()
        return self._kept[key]


def _reward(source: ModelSource, role: str, loading: dict[str, Any]) -> Reward:
    part = source.name.removeprefix("tiny:")
    if source.name.startswith("tiny:") and part in _FUNCTIONS:
        if source.keep != 1.0:
            raise InvalidArgument(f"{role}: {source.name!r} is a function; keep is for models")
        loading = {**loading, "tokenizer": None, "label": None}
        return load_reward(_FUNCTIONS[part], role, **loading)
    reward = load_reward(_path(source.name, role), role, **loading)
    if source.keep == 1.0:
        return reward
    sparse = sparsify_reward(reward.model, keep=source.keep, seed=source.sparsify_seed)
    return load_reward(sparse, role, **{**loading, "tokenizer": reward.tokenizer})


def _path(name: str, role: str) -> Any:
    """The folder of a part of the embedded world; any other name as it is."""
    if not name.startswith("tiny:"):
        return name
    part = name.removeprefix("tiny:")
    if part not in _FOLDERS:
        raise InvalidArgument(f"{role}: there is no {name!r}; {nearest(part, _FOLDERS)}")
    try:
        return getattr(load_tiny_world(), part)
    except FileNotFoundError as error:
        raise TqFastError(str(error)) from error


def _place(models: Models) -> torch.device:
    name = models.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=str(name)).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidArgument(f"device {name!r} cannot be used: {reason}") from error


def _dtype(models: Models) -> torch.dtype | str:
    name = models.get("dtype", "auto")
    if name not in _DTYPES:
        raise InvalidArgument(f"dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return name if name == "auto" else getattr(torch, str(name))
