"""What whole texts are drawn from: the baseline, the SFT model, or a prior under a value head."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from transformers import PreTrainedModel

from ..config import DecodeConfig, Role
from ..errors import InvalidArgument
from ..forest.language import device_of, vocab_size_of
from ..models.fingerprint import fingerprint_model
from ..models.served import ServedModel, is_local, require_local
from ..rewards.causal import CausalReward
from ..session import Session
from ..values.head import ValueHead
from .call import PresetCall
from .laws import MixtureLaw, ValueLaw
from .served import Law, ServedLaw, served_law

Source: TypeAlias = Literal["baseline", "sft", "value"]
ValueLike: TypeAlias = ValueHead | str | os.PathLike[str]


class TextSource:
    """The source of a method's texts, as the caller named it.

    Args:
        method: the preset's name, for messages.
        source: which law.
        value: the head, or its folder, for `source="value"`.

    Raises:
        InvalidArgument: there is no such source, or no head where one is needed.
    """

    def __init__(self, method: str, source: Source, value: ValueLike | None = None) -> None:
        if source not in get_args(Source):
            expected = ", ".join(map(repr, get_args(Source)))
            raise InvalidArgument(f"source must be one of {expected}, got {source!r}")
        if (source == "value") != (value is not None):
            needed = "is needed" if value is None else "has no part"
            raise InvalidArgument(f"value {needed} in {method!r} with source={source!r}")
        self.source = source
        self.head: ValueHead | None = None
        if value is not None:
            self.head = value if isinstance(value, ValueHead) else _load(value)

    def models_of(self, models: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out the models that the source has no use for; SFT always serves to measure.

        `options` are the caller's: `prior` in them, or in their config, says what a head guides.
        """
        used = dict(models)
        prior = options.get("prior") or getattr(options.get("config"), "prior", None)
        guides_sft = prior == "sft" or (prior is None and models.get("sft") is not None)
        if self.source == "sft" or (self.source == "value" and guides_sft):
            used["baseline"] = None
        return used

    def require(self, call: PresetCall) -> None:
        """Refuse a call without the model that the source draws from."""
        if self.source != "value":
            call.require(self.source)
        elif call.config.prior is not None:
            call.require(call.config.prior)
        elif not {"sft", "baseline"} & set(call.models):
            raise InvalidArgument(
                f"sft, or baseline, is needed by the method {call.method!r}: the model that the "
                "value head was fitted on, got None"
            )

    def law(
        self,
        session: Session,
        config: DecodeConfig,
        *,
        is_greedy: bool,
        measures_sft: bool,
    ) -> Law:
        """Return the law over the models of `session`.

        Args:
            session: the models.
            config: how tokens are drawn.
            is_greedy: take the arg max.
            measures_sft: run the SFT model beside another one, to measure the divergence to it.

        Raises:
            InvalidArgument: the head belongs to another model.
        """
        drawn_from = value_prior(session, config) if self.source == "value" else self.source
        is_other = drawn_from != "sft" and "sft" in session.languages
        measured: tuple[Role, ...] = ("sft",) if measures_sft and is_other else ()
        if self.head is None:
            weights: dict[Role, float] = {drawn_from: 1.0, **dict.fromkeys(measured, 0.0)}
            return mixture_law(session, weights, config, is_greedy=is_greedy)
        require_local(session.languages, "value_guided", "a value head reads a model's states")
        prior = cast(PreTrainedModel, session.languages[drawn_from])
        read = [prior]
        if self.head.config.reward_states:
            read.append(check_reward_states(session, self.head))
        _check_head(self.head, read, drawn_from, session.num_tokens)
        return ValueLaw(
            _on_device(self.head, device_of(prior)),
            drawn_from,
            eos=session.end_ids(config),
            vocab_size=session.num_tokens,
            config=config,
            is_greedy=is_greedy,
            measured=measured,
        )


def value_prior(session: Session, config: DecodeConfig) -> Role:
    """Return the role whose model a value head guides."""
    return config.prior or ("sft" if "sft" in session.languages else "baseline")


def mixture_law(
    session: Session, weights: Mapping[Role, float], config: DecodeConfig, *, is_greedy: bool
) -> MixtureLaw | ServedLaw:
    """Return the law of a model, or of a mixture, over the models of `session`."""
    # In the session's order: where one model has two roles it counts as the first of them.
    known = {role: weights[role] for role in session.languages if role in weights}
    drawn_from = {role: session.languages[role] for role, weight in known.items() if weight != 0.0}
    if len(drawn_from) > 1:
        require_local(drawn_from, "dera", "a mixture needs the log-probs of all tokens")
    (first, model), *_ = drawn_from.items()
    if isinstance(model, ServedModel):
        return served_law(session, first, config, is_greedy=is_greedy)
    # A server measures whole texts, which it does in the end.
    known = {role: weight for role, weight in known.items() if is_local(session.languages[role])}
    eos = session.end_ids(config)
    return MixtureLaw(known, eos, session.num_tokens, config, is_greedy)


def prior_fingerprint(model: PreTrainedModel) -> str:
    """Return what a head remembers of the model whose states it reads, whatever its dtype."""
    return fingerprint_model(model, None, rounded_to=torch.bfloat16)


def check_reward_states(session: Session, head: ValueHead | None = None) -> PreTrainedModel:
    """Return the reward's model; refuse one that cannot be read over the language models' tokens.

    Raises:
        InvalidArgument: there is no reward, it is no causal classifier over the same token ids, or
            not the one that `head` was fitted with.
    """
    reward = session.rewards.get("reward")
    if reward is None:
        raise InvalidArgument("value reads the states of the reward model; pass reward=, got None")
    ours, theirs = session.tokenizer, reward.tokenizer
    is_same = ours is None or theirs is None or ours.get_vocab() == theirs.get_vocab()
    if not isinstance(reward, CausalReward) or not is_same:
        raise InvalidArgument(
            "reward states are read off a causal sequence classifier with the language models' "
            f"own tokenizer, which {reward.name} is not"
        )
    if head is not None and head.config.models.get("reward") != prior_fingerprint(reward.model):
        raise InvalidArgument(
            f"value was fitted on the states of another reward model than {reward.name}"
        )
    return reward.model


def _load(value: Any) -> ValueHead:
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidArgument(
            f"value must be a ValueHead or a folder that ValueHead.save wrote, got {value!r}"
        )
    return ValueHead.load(value)


def _check_head(
    head: ValueHead, read: Sequence[PreTrainedModel], role: str, num_tokens: int
) -> None:
    """Refuse a head that was made for other models than `read`, the prior before the reward's."""
    prior = read[0]
    known = head.config.models.get("prior")
    if known is not None and known != prior_fingerprint(prior):
        raise InvalidArgument(
            f"value belongs to another model than {role}: it was fitted on the states of a model "
            f"with the fingerprint {known}, this one has {prior_fingerprint(prior)}"
        )
    width = getattr(prior.get_output_embeddings(), "in_features", None)
    if isinstance(width, int):
        width += sum(model.config.get_text_config().hidden_size for model in read[1:])
    if isinstance(width, int) and head.config.hidden_size != width:
        raise InvalidArgument(
            f"value reads states of {head.config.hidden_size} numbers, but those of {role} have "
            f"{width}"
        )
    if head.config.vocab_size < min(num_tokens, vocab_size_of(prior)):
        raise InvalidArgument(
            f"value has vectors for {head.config.vocab_size} tokens, but {role} has {num_tokens}"
        )


def _on_device(head: ValueHead, device: torch.device) -> ValueHead:
    if head.token_embeddings.device == device and not head.training:
        return head
    moved = ValueHead(head.config)
    moved.load_state_dict(head.state_dict())
    return moved.to(device).eval().requires_grad_(False)
