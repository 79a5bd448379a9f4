"""One call of a preset: its options read and checked, and its models loaded for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from ..config import DecodeConfig, DecodeOptions, Role
from ..errors import InvalidArgument
from ..models.options import ROLES, LoadingOptions
from ..prompts import Prompt, PromptReader
from ..prompts.chats import TemplateOptions
from ..results import DecodeResult
from ..session import Session
from ..session.method import Method
from ..streaming import TokenStream
from ..transfer.budget import check_sizes

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LOADING = tuple(field.name for field in dataclasses.fields(LoadingOptions))
RUNNING = ("template_options", "batch_size", "memory_budget", "progress")
_MODELS = ("baseline", "reward", "sft", "baseline_reward")
_OTHERS = ("config", *RUNNING, *_MODELS, *_LOADING)

# The config fields that each method fixes. Some are arguments of the method's own instead: `prior`
# of args, and `strategy` of refine and blocks, which chooses between texts.
FIXED_FIELDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "sft": {},
        "baseline": {},
        "dera": {},
        "best_of_n": {"strategy": "sample"},
        "args": {"horizon": 0, "transfer": "direct"},
        "controlled_decoding": {"prior": "sft", "candidates_from": "sft", "transfer": "direct"},
        "transfer_q": {"transfer": "direct"},
        "direct_on_target": {"transfer": "direct"},
        "transfer_q_indirect": {"transfer": "indirect"},
        "value_guided": {},
        "refine": {},
        "blocks": {},
        "collab": {"transfer": "direct"},
    }
)

# Methods that draw whole texts from a model, and so from its law at a temperature.
_SAMPLING_METHODS = ("sft", "baseline", "dera", "best_of_n", "value_guided", "refine", "blocks")
# Those whose `strategy` is fixed, or chooses between texts.
_TEXT_METHODS = ("best_of_n", "refine", "blocks")
# What other tools call the settings of sampling, and the fields that they are.
SAMPLING_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "temperature": "rollout_temperature",
        "top_k": "rollout_top_k",
        "top_p": "rollout_top_p",
    }
)


def sampling_field(method: str, name: str, value: object) -> str:
    """Return the field that the setting `name` of another tool is for `method`.

    Raises:
        InvalidArgument: the method does not draw from a model's own law.
    """
    field = SAMPLING_FIELDS[name]
    if method not in _SAMPLING_METHODS:
        raise InvalidArgument(
            f"{name}={value!r} is no setting of the method {method!r}, which draws each token "
            f"from softmax(log prior + Q / alpha): pass alpha for the choice, or {field} for the "
            "roll-outs"
        )
    return field


def chooses_tokens(method: str) -> bool:
    """Whether `strategy` says how the tokens of `method` are chosen."""
    return method not in _TEXT_METHODS


class OpenMethod:
    """A method whose models are loaded, for many calls of `decode`.

    Args:
        name: the preset's name.
        session: its models.
        make: makes the method over them, for a config.
        config: the settings, with those that the method fixes.
    """

    def __init__(
        self,
        name: str,
        session: Session,
        make: Callable[[Session, DecodeConfig], Method],
        config: DecodeConfig,
    ) -> None:
        self.name = name
        self.session = session
        self._make = make
        self.method = make(session, config)

    @property
    def config(self) -> DecodeConfig:
        """The settings of the method, with those that it fixes."""
        return self.method.config

    def with_settings(self, **fields: Unpack[DecodeOptions]) -> OpenMethod:
        """Return the method over the same models with other settings.

        Raises:
            InvalidArgument: a field is unknown or wrong, or another value of one that is fixed.
        """
        for name, value in FIXED_FIELDS[self.name].items():
            if fields.get(name, value) != value:
                raise InvalidArgument(
                    f"{name} is {value!r} for the method {self.name!r}, got {fields.get(name)!r}"
                )
        config = DecodeConfig.from_options(self.config, **fields)
        return OpenMethod(self.name, self.session, self._make, config)

    def decode(
        self, prompts: Any, *, template_options: TemplateOptions | None = None, **running: Any
    ) -> DecodeResult:
        """Decode `prompts`; the keyword arguments are those of `TransferDecoder.decode`."""
        return self.session.decode(
            prompts, self.method, template_options=template_options, **running
        )

    def stream(
        self,
        prompt: Any,
        *,
        template_options: TemplateOptions | None = None,
        memory_budget: int | None = None,
    ) -> TokenStream:
        """Return an iterator over the tokens of one prompt, as that of `TransferDecoder.stream`.

        Methods that choose token by token yield each as it is chosen; those that draw whole texts
        yield the tokens when the text is settled.
        """
        return self.session.stream(
            prompt, self.method, template_options=template_options, memory_budget=memory_budget
        )

    def prompt_reader(self, template_options: TemplateOptions | None = None) -> PromptReader:
        """Return a reader of one prompt at a time, as that of `TransferDecoder`."""
        return self.session.prompt_reader(template_options)

    def check_length(self, idx: int, prompt: Prompt) -> None:
        """Refuse a prompt that is too long for a model; `decode` does this by itself.

        Raises:
            InvalidArgument: the message names `prompts[idx]`, its length and what is allowed.
        """
        self.session.check_fits(idx, prompt, self.method.num_new, self.method.room)


class PresetCall:
    """The settings of one call of `method`.

    Args:
        method: the preset's name, for messages.
        options: the caller's keyword arguments, but for those of the method's own and the models.
        models: models that the method uses where they are given, by argument name.
        fixed: config fields that this call fixes, beside those of the method.

    Raises:
        InvalidArgument: an option is unknown or wrong, or differs from what the method fixes.
    """

    def __init__(
        self,
        method: str,
        options: Mapping[str, Any],
        models: Mapping[str, Any],
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        options, fixed = dict(options), {**FIXED_FIELDS[method], **(fixed or {})}
        self.method = method
        base = DecodeConfig.from_options(options.pop("config", None))
        baseline_reward = options.pop("baseline_reward", None)
        # Wrong settings are refused before any model is loaded.
        self.loading = LoadingOptions(
            **{name: options.pop(name) for name in _LOADING if name in options}
        )
        self.models = {name: model for name, model in models.items() if model is not None}
        default = DecodeConfig()
        for name, value in fixed.items():
            in_config = getattr(base, name)
            given = options.get(name, value if in_config == getattr(default, name) else in_config)
            if given != value:
                raise InvalidArgument(
                    f"{name} is {value!r} for the method {method!r}, got {given!r}"
                )
        merged = {**options, **fixed}
        if fixed.get("transfer") == "indirect" and merged.get("beta", base.beta) is None:
            raise InvalidArgument(f"beta is needed by the method {method!r}, got None")
        self.config = DecodeConfig.from_options(base, _OTHERS, **merged)
        if self.config.needs_baseline_reward and baseline_reward is not None:
            self.models["baseline_reward"] = baseline_reward

    def require(self, *names: str) -> None:
        """Refuse a call without the models `names`."""
        for name in names:
            if name not in self.models:
                raise InvalidArgument(f"{name} is needed by the method {self.method!r}, got None")

    def open(self, make: Callable[[Session, DecodeConfig], Method]) -> OpenMethod:
        """Load the models and make the method over them by `make(session, config)`."""
        rewards = {role: self.models.get(role) for role in ("reward", "baseline_reward")}
        others = [role for role in self.models if role not in (*ROLES, *rewards)]
        roles = cast(list[Role], ["baseline", *others, "sft"])
        languages = {role: self.models.get(role) for role in roles}
        session = Session(languages, rewards, self.loading)
        return OpenMethod(self.method, session, make, self.config)


def check_running(running: Mapping[str, Any]) -> None:
    """Refuse wrong sizes before any model is loaded."""
    check_sizes(running.get("batch_size", 1), running.get("memory_budget"))
