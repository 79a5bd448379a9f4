"""Loading models and tokenizers from hub ids, local folders or objects that are loaded already."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InvalidArgument
from ..forest.support import check_supported
from ..rewards.base import Reward, RewardFunction, Texts
from ..rewards.kinds import (
    is_classifier,
    open_classifier,
    open_object,
    resolve_reward,
    with_special_tokens,
)
from ..rewards.options import RewardOptions
from ..rewards.served import ServedReward
from ..servers import Server, open_reward_server
from .adapters import read_adapter_folder, short, unwrap
from .checkpoints import existing, tokenizer_options
from .served import LanguageModel, ServedModel, vocabulary_size
from .shared_weights import Loader

# A module is a model of transformers, or what torch.compile or peft made of one; a server holds one
# behind a URL, and may be named by the URL alone.
ModelLike: TypeAlias = str | os.PathLike[str] | torch.nn.Module | Server
TokenizerLike: TypeAlias = str | os.PathLike[str] | PreTrainedTokenizerBase


def load_language_model(
    source: ModelLike,
    role: str,
    *,
    device: torch.device,
    dtype: torch.dtype | str,
    loader: Loader | None = None,
) -> PreTrainedModel:
    """Return the causal LM of `role`, in evaluation mode; refuse what the forest cannot run.

    Args:
        source: a hub id, a folder (an adapter's too), or a model in whatever wrapper.
        role: the argument's name, for messages.
        device: where a model given by name is put.
        dtype: of a model given by name.
        loader: loads for all roles what they have in common; None: this role is alone.

    Raises:
        InvalidArgument: there is no such folder, or nothing loadable in it.
        UnsupportedModel: the architecture uses something that the forest does not honour.
    """
    loader = loader or Loader({role: source}, devices={role: device}, dtype=dtype)
    model = loader.language_model(source, role)
    if model.get_output_embeddings() is None:
        raise InvalidArgument(
            f"{role} must be a causal language model, got {type(model).__name__}, which has no "
            "language-model head"
        )
    check_supported(model, role)
    return model


def load_tokenizer(
    source: TokenizerLike | None,
    model: ModelLike | None,
    role: str,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer given as `source`, else the one that lies beside the model.

    The tokenizer of a model object is looked for under its name, in its folder or in what the hub
    left on this machine. None where there is none.

    Args:
        source: a hub id, a folder or a tokenizer.
        model: the model that it belongs to.
        role: the argument's name, for messages.
        options: keyword arguments that the model was loaded with.
    """
    found = tokenizer_options(options or {})
    if isinstance(source, (str, os.PathLike)):
        return _tokenizer_from(existing(source, role), role, {})
    if source is not None:
        if not callable(source) or not hasattr(source, "decode"):
            raise InvalidArgument(
                f"{role} must be a hub id, a folder or a tokenizer of transformers, got "
                f"{type(source).__name__}"
            )
        return source
    if not isinstance(model, (str, os.PathLike)):
        name = getattr(unwrap(model, role).model, "name_or_path", None)
        return _tokenizer_by_name(name, role)
    name = existing(model, role)
    is_folder = Path(name).is_dir()
    if not is_folder or _holds_tokenizer(Path(name), found):
        try:
            return _tokenizer_from(name, role, found)
        except InvalidArgument:
            if is_folder or read_adapter_folder(name, role, options or {}) is None:
                raise
    adapter = read_adapter_folder(name, role, options or {})
    # An adapter without a tokenizer reads the one of its base.
    return None if adapter is None else load_tokenizer(None, adapter.base, role)


def load_reward(
    source: ModelLike | RewardFunction,
    role: str,
    *,
    tokenizer: TokenizerLike | None,
    texts: Texts,
    label: int | None,
    vocab_size: int,
    device: torch.device,
    dtype: torch.dtype | str,
    options: RewardOptions | None = None,
    loader: Loader | None = None,
) -> Reward:
    """Return the reward that `source` names or is.

    Args:
        source: a sequence classifier (hub id, folder or model), a function
            `(prompts, responses) -> floats` or the name of one, `package.module:function`, or
            another object that `tq_fast.rewards.base` lists.
        role: the argument's name, for messages.
        tokenizer: the classifier's; None: that of its own folder.
        texts: decodes with the baseline's tokenizer.
        label: which label of a classifier is the reward.
        vocab_size: the baseline's; a classifier without a tokenizer must read the same ids.
        device: where a classifier is put.
        dtype: of a classifier that is loaded here.
        options: how prompts and responses are read; None: all at their defaults.
        loader: loads for all roles what they have in common; None: this role is alone.
    """
    options = options or RewardOptions()
    server = Server.named(source, None if loader is None else loader.options_of(role))
    if server is not None:
        if tokenizer is not None:
            server = dataclasses.replace(server, tokenizer=tokenizer)
        return ServedReward(
            open_reward_server(server, label=label),
            role,
            with_special_tokens(texts, options),
            options=options,
        )
    loader = loader or Loader({role: source}, devices={role: device}, dtype=dtype)
    resolved: Any = resolve_reward(loader.object_of(source, role), role)
    if not is_classifier(resolved):
        return open_object(
            resolved,
            role,
            has_tokenizer=tokenizer is not None,
            texts=texts,
            label=label,
            options=options,
        )
    is_found = isinstance(resolved, (str, os.PathLike, PreTrainedModel))
    found_in = resolved if is_found else None
    own = None
    if tokenizer is not None or found_in is not None:
        own = load_tokenizer(
            tokenizer,
            found_in,
            role if tokenizer is None else f"{role}_tokenizer",
            loader.options_of(role),
        )
    model = resolved if found_in is None else loader.classifier(resolved, role)
    with torch.no_grad():
        return open_classifier(
            model,
            role,
            tokenizer=own,
            texts=texts,
            label=label,
            options=options,
            vocab_size=vocab_size,
        )


def check_same_vocabulary(
    role: str,
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None],
    models: tuple[LanguageModel, LanguageModel],
    *,
    is_given: bool,
) -> None:
    """Refuse a model whose token ids mean something else than the baseline's.

    One of them may know more tokens than the other, as after a training run that added one.

    Args:
        role: of the model, for messages.
        tokenizers: the one that reads the prompts, and the one found beside the model.
        models: the baseline, and the model.
        is_given: whether the caller gave the first one, which says that it is both models'.

    Raises:
        InvalidArgument: the vocabularies differ, or one is not known.
    """
    if models[0] is models[1]:
        return
    baseline, other = tokenizers
    if baseline is not None and other is not None:
        ours, theirs = baseline.get_vocab(), other.get_vocab()
        if ours == theirs:
            return
        differing = _first_difference(ours, theirs)
        if differing is not None:
            raise InvalidArgument(
                f"{role} and baseline must have the same tokenizer vocabulary; they differ (sizes "
                f"{len(theirs)} and {len(ours)}), for one in the token {differing!r}"
            )
        return
    sizes = [vocabulary_size(model) for model in models[::-1]]
    if sizes[0] != sizes[1]:
        raise InvalidArgument(
            f"{role} and baseline must have the same vocabulary, got sizes {sizes[0]} and "
            f"{sizes[1]} and not both tokenizers"
        )
    # A model that was made in memory, without a name, was made for the ids at hand.
    first, name = (getattr(model, "name_or_path", "a server") for model in models)
    if baseline is not None and name and not is_given and name != first:
        raise InvalidArgument(
            f"{role} comes from {name!r}, where no tokenizer is found; vocabularies of one size "
            "need not be one vocabulary: pass tokenizer=, where it is both models'"
        )


def _first_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str | None:
    """A token that has another id in one vocabulary, or whose id is another token's there."""
    meanings = {token_id: token for token, token_id in theirs.items()}
    differing = [
        token
        for token, token_id in ours.items()
        if theirs.get(token, token_id) != token_id or meanings.get(token_id, token) != token
    ]
    return min(differing, default=None)


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the least number above every id that is a token, added tokens included."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def end_token_ids(
    model: LanguageModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """The model's own end-of-sequence ids, else its tokenizer's, else none.

    Of a model behind a URL its tokenizer's are known alone.
    """
    own: tuple[Any, ...] = ()
    if not isinstance(model, ServedModel):
        own = (getattr(model, "generation_config", None), model.config.get_text_config())
    for owner in (*own, tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def _tokenizer_by_name(name: str | None, role: str) -> PreTrainedTokenizerBase | None:
    if not name:
        return None
    if Path(name).is_dir():
        return _tokenizer_from(name, role, {}) if _holds_tokenizer(Path(name), {}) else None
    try:
        # A model object was loaded already: its name is no order to download anything.
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, ImportError):
        return None


def _tokenizer_from(name: str, role: str, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        # A file that holds something else can end in any error, and in a bare one of tokenizers.
        raise InvalidArgument(f"{role}: no tokenizer in {name!r}: {short(error)}") from error


def _holds_tokenizer(folder: Path, options: Mapping[str, Any]) -> bool:
    if "gguf_file" in options:
        return True
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((folder / (options.get("subfolder") or "") / name).is_file() for name in names)
