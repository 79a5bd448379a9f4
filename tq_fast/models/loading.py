"""Loading models and tokenizers from hub ids, local folders or objects that are loaded already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import InvalidArgument, UnsupportedModel
from ..forest.language import vocab_size_of
from ..forest.support import check_supported
from ..rewards.base import Reward, RewardFunction, Texts
from ..rewards.kinds import is_classifier, open_classifier, open_object, resolve_reward
from ..rewards.options import RewardOptions

ModelLike: TypeAlias = str | os.PathLike[str] | PreTrainedModel
TokenizerLike: TypeAlias = str | os.PathLike[str] | PreTrainedTokenizerBase


def load_language_model(
    source: ModelLike, role: str, *, device: torch.device, dtype: torch.dtype | str
) -> PreTrainedModel:
    """Return the causal LM of `role`, in evaluation mode; refuse what the forest cannot run.

    Raises:
        InvalidArgument: there is no such folder, or nothing loadable in it.
        UnsupportedModel: the architecture uses something that the forest does not honour.
    """
    model = _load(AutoModelForCausalLM, source, role, device=device, dtype=dtype)
    if model.get_output_embeddings() is None:
        raise InvalidArgument(
            f"{role} must be a causal language model, got {type(model).__name__}, which has no "
            "language-model head"
        )
    check_supported(model, role)
    return model


def load_tokenizer(
    source: TokenizerLike | None, model: ModelLike | None, role: str
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer given as `source`, else the one in the model's own folder.

    None where a model object comes from no folder, or its folder holds no tokenizer.
    """
    if isinstance(source, (str, os.PathLike)):
        return _tokenizer_from(_existing(source, role), role)
    if source is not None:
        if not callable(source) or not hasattr(source, "decode"):
            raise InvalidArgument(
                f"{role} must be a hub id, a folder or a tokenizer of transformers, got {source!r}"
            )
        return source
    if isinstance(model, PreTrainedModel):
        folder = model.name_or_path
        if not folder or not Path(folder).is_dir():
            return None
        model = folder
    if Path(model).is_dir() and not _holds_tokenizer(Path(model)):
        return None
    return _tokenizer_from(_existing(model, role), role)


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
    """
    options = options or RewardOptions()
    source = resolve_reward(source, role)
    if not is_classifier(source):
        return open_object(
            source,
            role,
            has_tokenizer=tokenizer is not None,
            texts=texts,
            label=label,
            options=options,
        )
    is_named = isinstance(source, (str, os.PathLike))
    found_in = source if is_named or isinstance(source, PreTrainedModel) else None
    own = None
    if tokenizer is not None or found_in is not None:
        own = load_tokenizer(
            tokenizer, found_in, role if tokenizer is None else f"{role}_tokenizer"
        )
    model = source
    if found_in is not None:
        model = _load(AutoModelForSequenceClassification, source, role, device=device, dtype=dtype)
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
    baseline: PreTrainedTokenizerBase | None,
    sft: PreTrainedTokenizerBase | None,
    baseline_model: PreTrainedModel,
    sft_model: PreTrainedModel,
) -> None:
    """Refuse an SFT model whose token ids mean something else than the baseline's."""
    if baseline is not None and sft is not None:
        ours, theirs = baseline.get_vocab(), sft.get_vocab()
        if ours != theirs:
            differing = sorted(ours.items() ^ theirs.items())[0][0]
            raise InvalidArgument(
                "sft and baseline must have the same tokenizer vocabulary; they differ (sizes "
                f"{len(theirs)} and {len(ours)}), for one in the token {differing!r}"
            )
        return
    sizes = [vocab_size_of(model) for model in (sft_model, baseline_model)]
    if sizes[0] != sizes[1]:
        raise InvalidArgument(
            f"sft and baseline must have the same vocabulary, got sizes {sizes[0]} and {sizes[1]} "
            "and not both tokenizers"
        )


def end_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """The model's own end-of-sequence ids, else its tokenizer's, else none."""
    generation = getattr(model, "generation_config", None)
    for owner in (generation, model.config.get_text_config(), tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def _load(
    auto_class: Any, source: ModelLike, role: str, *, device: torch.device, dtype: Any
) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise InvalidArgument(
            f"{role} must be a hub id, a folder or a model of transformers, got {source!r}"
        )
    name = _existing(source, role)
    try:
        config = AutoConfig.from_pretrained(name)
        if auto_class is AutoModelForCausalLM and type(config) not in auto_class._model_mapping:
            raise UnsupportedModel(
                f"{role}: model type {config.model_type!r} is no causal language model"
            )
        model = auto_class.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        if isinstance(error, UnsupportedModel):
            raise
        raise InvalidArgument(f"{role}={os.fspath(source)!r} cannot be loaded: {error}") from error
    return model.to(device).eval()


def _tokenizer_from(name: str, role: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{role}: no tokenizer in {name!r}: {error}") from error


def _holds_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


def _existing(source: str | os.PathLike[str], role: str) -> str:
    """Return `source` if it is a folder that exists or may be a hub id."""
    name = os.fspath(source)
    if Path(name).is_dir():
        return name
    is_path = isinstance(source, os.PathLike) or name.startswith((".", "/", "~"))
    # "models/nope" beside a folder "models" is a slip of the pen, not an organisation's model.
    is_path = is_path or ("/" in name and Path(name).parent.is_dir())
    if not name or is_path or name.count("/") > 1:
        raise InvalidArgument(f"{role}={name!r}: there is no such folder")
    return name
