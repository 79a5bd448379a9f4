"""Find out what kind of reward an object is, by what it takes and what it returns."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InvalidArgument, warn_caller
from ..forest.language import num_embedded
from ..forest.support import check_supported
from .base import Reward, Texts
from .causal import CausalReward
from .encoder import EncoderReward
from .function import SIGNATURE, FunctionReward, load_function, names_a_function
from .lengths import positions_of_encoder
from .objects import PipelineReward, PredictorReward, check_pipeline, is_pipeline
from .options import RewardOptions
from .probe import probe_classifier

_EXPECTED = f"a hub id, a folder, a sequence classifier or a function {SIGNATURE}"


def resolve_reward(source: Any, role: str) -> Any:
    """Return `source`, or the function that it names as `module:function`.

    Raises:
        InvalidArgument: there is no such module or function.
    """
    if isinstance(source, str) and names_a_function(source):
        return load_function(source, role)
    return source


def is_classifier(source: Any) -> bool:
    """Whether `source` names or is a module that reads token ids."""
    if isinstance(source, (str, os.PathLike, PreTrainedModel)):
        return True
    if not isinstance(source, torch.nn.Module) or _predicts(source):
        return False
    return "input_ids" in inspect.signature(source.forward).parameters


def open_object(
    source: Any,
    role: str,
    *,
    has_tokenizer: bool,
    texts: Texts,
    label: int | None,
    options: RewardOptions,
) -> Reward:
    """Return the reward that an object is which reads texts: a function, pipeline or predictor.

    Args:
        source: the object.
        role: the argument's name, for messages.
        has_tokenizer: whether a tokenizer was given beside it.
        texts: decodes with the baseline's tokenizer.
        label: which of several labels is the reward.
        options: how prompts and responses are read.

    Raises:
        InvalidArgument: it is no reward; the message says what is expected.
    """
    texts = with_special_tokens(texts, options)
    reads_texts = is_pipeline(source) or _predicts(source)
    if reads_texts and texts.tokenizer is None:
        raise InvalidArgument(
            f"{role} reads texts, but the baseline came without a tokenizer; pass tokenizer="
        )
    if reads_texts and has_tokenizer:
        raise InvalidArgument(f"{role} has a tokenizer of its own; {role}_tokenizer is not read")
    if is_pipeline(source):
        check_pipeline(source, role)
        return PipelineReward(source, texts, label, options)
    if reads_texts:
        return PredictorReward(source, texts, label)
    if not callable(source) or isinstance(source, type):
        raise InvalidArgument(f"{role} must be {_EXPECTED}, got {_named(source)}")
    if has_tokenizer or label is not None:
        raise InvalidArgument(f"{role} is a function, which takes no tokenizer and no label index")
    if options.pair or options.truncate:
        raise InvalidArgument(
            f"{role} is a function, which gets prompts and responses as they are: pair and "
            "truncate of reward_options are for classifiers"
        )
    return FunctionReward(source, texts, role)


def open_classifier(
    model: torch.nn.Module,
    role: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Texts,
    label: int | None,
    options: RewardOptions,
    vocab_size: int,
) -> Reward:
    """Return the reward that a loaded classifier is, after trying its forward on a few tokens.

    Args:
        model: the classifier, in evaluation mode.
        role: the argument's name, for messages.
        tokenizer: given or found beside the model; None: its name may lead to one.
        texts: decodes with the baseline's tokenizer.
        label: which of several labels is the reward.
        options: how prompts and responses are read.
        vocab_size: the baseline's.

    Raises:
        InvalidArgument: it gives no scores, or what its token ids mean is not known.
        UnsupportedModel: a causal classifier that the forest does not honour.
    """
    texts = with_special_tokens(texts, options)
    if tokenizer is None and texts.tokenizer is not None:
        tokenizer = _tokenizer_by_name(model)
    _check_vocabulary(model, role, tokenizer, texts, vocab_size)
    if options.pair and (tokenizer or texts.tokenizer) is None:
        raise InvalidArgument(
            f"reward_options: pair=True needs the {role}'s tokenizer; pass {role}_tokenizer="
        )
    try:
        probe = probe_classifier(
            model,
            tokenizer or texts.tokenizer,
            vocab_size=vocab_size,
            limit=positions_of_encoder(model, tokenizer),
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InvalidArgument(
            f"{role} must be a sequence classifier, got {type(model).__name__}: {error}"
        ) from error
    known: dict[str, Any] = {"options": options, "num_labels": probe.num_labels}
    if probe.obstacle == "":
        assert isinstance(model, PreTrainedModel), "only those are tried over a forest"
        check_supported(model, role)
        return CausalReward(model, tokenizer, texts, label, **known)
    if probe.obstacle is not None:
        warn_caller(
            f"{role}: whole texts go through {type(model).__name__}.forward, which is slower than "
            f"encoding each prefix once: {probe.obstacle}"
        )
    return EncoderReward(model, tokenizer, texts, label, **known, batches=probe.batches)


def _check_vocabulary(
    model: Any,
    role: str,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Texts,
    vocab_size: int,
) -> None:
    """Refuse a model whose token ids mean something that is not known."""
    if tokenizer is not None:
        if texts.tokenizer is None:
            raise InvalidArgument(
                f"{role} has a tokenizer, but the baseline came without one, so that nothing can "
                "be turned into its token ids; pass tokenizer="
            )
        return
    has_embedding = isinstance(model, PreTrainedModel)
    num_ids = num_embedded(model) if has_embedding else vocab_size
    if num_ids != vocab_size:
        raise InvalidArgument(
            f"{role} has a vocabulary of {num_ids}, the baseline one of {vocab_size}, and no "
            f"tokenizer of its own; pass {role}_tokenizer="
        )
    if texts.tokenizer is None:
        return
    # A model that was made in memory, without a name, was made for the ids at hand.
    name = getattr(model, "name_or_path", "")
    if name or not has_embedding:
        kind = type(model).__name__
        origin = f"comes from {name!r}, where" if name else f"is a {kind}, for which"
        raise InvalidArgument(
            f"{role} {origin} no tokenizer is found; vocabularies of one size need not be one "
            f"vocabulary: pass {role}_tokenizer="
        )


def _tokenizer_by_name(model: torch.nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the folder, or of the hub's cache, that a loaded model names."""
    name = getattr(model, "name_or_path", "")
    if not name:
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def with_special_tokens(texts: Texts, options: RewardOptions) -> Texts:
    """Return `texts` that keep special tokens of responses, where the options ask for it."""
    if not options.keep_special_tokens:
        return texts
    return Texts(texts.tokenizer, keep_special_tokens=True)


def _predicts(source: Any) -> bool:
    return not isinstance(source, type) and callable(getattr(source, "predict", None))


def _named(source: Any) -> str:
    """How a message names an object: no model is printed."""
    is_large = isinstance(source, (torch.nn.Module, type))
    return f"{source if isinstance(source, type) else type(source)}" if is_large else repr(source)
