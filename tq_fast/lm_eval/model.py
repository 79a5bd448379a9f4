"""Answers to the requests of lm-evaluation-harness, decoded by a method of tq_fast."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from ..errors import InvalidArgument
from ..presets import open_method
from ..presets.call import SAMPLING_FIELDS, chooses_tokens, sampling_field
from ..results import Certificate, weakest_kl_kind
from ..transfer.budget import check_sizes

_DEFAULT_DEVICE = "cuda:0"


@register_model("tq_fast")
class TransferModel(LM):  # type: ignore[misc]
    """A method and its models, for tasks whose answers are generated.

    A request's `until`, `max_gen_toks` and `do_sample` become `stop`, `max_new_tokens` and
    `strategy`, which `strategy` in `model_args` overrules. Its temperature, top_k and top_p count
    for methods that draw whole texts from a model; others refuse them, unless they say nothing
    (`--gen_kwargs temperature=1`). What else a request asks for is refused by name. Prompts that
    are longer than a model takes are refused, and never cut.

    Args:
        method: the name of a preset.
        batch_size: prompts decoded together.
        max_batch_size: must be None: the harness has it for batches of unknown sizes.
        memory_budget: most bytes of KV and logits.
        progress: show a progress bar.
        max_gen_toks: new tokens of a request that does not say how many.
        device: where models are put. "cuda:0", which the harness says where nobody does, is a CPU
            on a machine without a GPU.
        **options: the keyword arguments of the preset: models by name, fields of `DecodeConfig`.

    Raises:
        InvalidArgument: an argument is wrong.
    """

    def __init__(
        self,
        method: str = "transfer_q",
        *,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        memory_budget: int | None = None,
        progress: bool = False,
        max_gen_toks: int = 256,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if device == _DEFAULT_DEVICE and not torch.cuda.is_available():
            device = None
        if max_batch_size is not None:
            raise InvalidArgument(
                f"max_batch_size must be None, got {max_batch_size!r}; pass memory_budget in "
                "model_args, which makes batches as small as they must be"
            )
        if isinstance(batch_size, str) and batch_size.isdecimal():
            batch_size = int(batch_size)
        check_sizes(batch_size, memory_budget)
        self.running: dict[str, Any] = {"batch_size": batch_size, "memory_budget": memory_budget}
        self.progress = progress
        self.max_gen_toks = max_gen_toks
        self.has_strategy = "strategy" in options
        self.opened = open_method(method, device=device, **options)
        if self.tokenizer is None:
            raise InvalidArgument(
                "tokenizer must be given, got None: the baseline came without one, and the prompts "
                "of the harness are text"
            )
        if self.opened.config.num_return_sequences != 1:
            raise InvalidArgument(
                "num_return_sequences must be 1, got "
                f"{self.opened.config.num_return_sequences}: a request has one answer"
            )
        self.certificates: list[Certificate] = []

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the language models."""
        return self.opened.session.tokenizer

    @property
    def tokenizer_name(self) -> str:
        """The name by which the harness keeps requests that were rendered."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the tokenizer's template, the one that is used.

        Raises:
            InvalidArgument: another one of several is asked for by its name.
        """
        if isinstance(chat_template, str):
            raise InvalidArgument(
                f"apply_chat_template must be True, got {chat_template!r}: the template is the "
                "tokenizer's own"
            )
        return str(self.tokenizer.chat_template) if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages as the text that the models continue.

        Raises:
            InvalidArgument: the tokenizer has no chat template.
        """
        if not self.tokenizer.chat_template:
            raise InvalidArgument(
                "apply_chat_template needs a chat template, which the baseline's tokenizer lacks"
            )
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Refuse: the log-likelihood of a given text is not known under these methods.

        Raises:
            InvalidArgument: always.
        """
        raise InvalidArgument(
            "tq_fast runs tasks whose output_type is 'generate_until' alone: its methods choose "
            "tokens by roll-outs, and know no log-likelihood of a given text"
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        """Refuse, as `loglikelihood` does.

        Raises:
            InvalidArgument: always.
        """
        return self.loglikelihood(requests)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a response to each request, which ends before its stop string.

        Args:
            requests: whose `args` are the prompt and the settings of its response.
            disable_tqdm: show no progress bar.

        Raises:
            InvalidArgument: a setting has no meaning for the method, or a prompt is too long.
        """
        groups: dict[str, list[int]] = {}
        for idx, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(idx)
        answers = [""] * len(requests)
        # Settings are refused before the first group is decoded.
        opened = [
            self.opened.with_settings(**self._settings(requests[members[0]].args[1]))
            for members in groups.values()
        ]
        for method, members in zip(opened, groups.values(), strict=True):
            result = method.decode(
                [requests[idx].args[0] for idx in members],
                progress=self.progress and not disable_tqdm,
                **self.running,
            )
            self.certificates += result.certificates
            assert result.texts is not None, "there is a tokenizer"
            for idx, text in zip(members, result.texts, strict=True):
                answers[idx] = text
                self.cache_hook.add_partial("generate_until", requests[idx].args, text)
        return answers

    def _settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of DecodeConfig that a request asks for."""
        asked = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        settings: dict[str, Any] = {
            "stop": [string for string in asked.pop("until") if string],
            "max_new_tokens": asked.pop("max_gen_toks"),
        }
        name, does_sample = self.opened.name, asked.pop("do_sample")
        if chooses_tokens(name) and not self.has_strategy:
            settings["strategy"] = "sample" if does_sample else "greedy"
        for setting in SAMPLING_FIELDS:
            value, neutral = asked.pop(setting, None), 0 if setting == "top_k" else 1
            # The harness writes a temperature of 0 where nothing is sampled.
            if not does_sample or value in (None, neutral):
                continue
            try:
                settings[sampling_field(name, setting, value)] = value
            except InvalidArgument as error:
                raise InvalidArgument(
                    f"{error}; --gen_kwargs {setting}={neutral} takes it out of the task"
                ) from error
        if asked:
            names = ", ".join(f"{key}={value!r}" for key, value in asked.items())
            raise InvalidArgument(f"gen_kwargs: {names} is not read by tq_fast")
        return settings

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results of the harness say of the method: its mean divergences, nats."""
        found: dict[str, Any] = {"tq_fast_method": self.opened.name}
        for name in ("kl_to_sft", "kl_to_baseline"):
            values = [getattr(certificate, name) for certificate in self.certificates]
            if values and None not in values:
                found[name] = math.fsum(values) / len(values)
        found["kl_kind"] = weakest_kl_kind(c.kl_kind for c in self.certificates)
        return found
