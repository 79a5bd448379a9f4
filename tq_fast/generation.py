"""The methods behind `model.generate` of transformers: `custom_generate=tq_fast.generate`."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .config import DecodeConfig
from .errors import InvalidArgument, UnsupportedModel
from .models.generation import settings_that_choose
from .presets import METHODS, open_method, own_settings
from .presets.call import SAMPLING_FIELDS, chooses_tokens, sampling_field
from .results import DecodeResult
from .session.method import MethodOptions, RunOptions

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

# Settings that choose tokens and are read whatever the method is. What was passed as max_new_tokens
# stands in `max_length`, to which `generate` adds the length of the prompt.
_READ = ("min_length", "min_new_tokens", "num_return_sequences")
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# Fields of DecodeConfig that `generate` has settings of its own for.
_FROM_GENERATE = ("max_new_tokens", "min_new_tokens", "eos_token_id", "num_return_sequences")
# The names of the cache, of which the first is that of transformers below 5.24.
_CACHES = ("past_key_values", "cache")
# Inputs of the model that transformers makes for its own loop; the methods make their own.
_OF_THE_LOOP = ("attention_mask", "position_ids", *_CACHES, "use_cache", "logits_to_keep")


@dataclasses.dataclass
class DecodedOutput(GenerateDecoderOnlyOutput):  # type: ignore[misc]
    """What `generate` returns under `return_dict_in_generate=True`.

    Attributes:
        sequences: prompts and responses, int64 `[N, P + T]`, padded on the right.
        result: the result of the decode, with traces and certificates.
    """

    result: DecodeResult | None = None


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    method: str = "transfer_q",
    streamer: BaseStreamer | None = None,
    **options: Any,
) -> torch.Tensor | DecodedOutput:
    """Decode by Transfer Q* in the place of the loop of `model.generate`.

    Equals `tq_fast.presets.METHOD` on the prompts without their padding, on either side:

        model.generate(**inputs, custom_generate=tq_fast.generate, reward=reward, alpha=0.5)

    The model whose `generate` is called takes the role that is left: it is the baseline, which
    rolls out, also where `sft=` names a prior; where `baseline=` (or `baselines=`) is given it is
    `sft`, the prior that is steered; and for a method that has no baseline it is `sft` too.

    Of the settings of `generate`, lengths, `eos_token_id`, `pad_token_id`, `num_return_sequences`,
    `streamer`, `return_dict_in_generate` and `do_sample` (`strategy`: without it, the arg max) are
    read, also from the model's own generation_config; temperature, top_k and top_p where they are
    passed to a method that draws whole texts (top_k=50, the default of transformers, counts as not
    passed). What else would change the tokens is refused where it was passed, and warned about
    where it stands in the model's generation_config. Random draws follow `seed`, 0 if it is not
    given, rather than torch's own state.

    transformers keeps `tokenizer=` from a callable, and refuses `stop_strings=`: pass `stop=`, and
    a tokenizer that does not lie beside the model as
    `custom_generate=functools.partial(tq_fast.generate, tokenizer=tokenizer)`.

    Args:
        method: the name of a preset.
        streamer: gets each token as it is chosen, or when the text is settled, for methods that
            choose between whole texts.
        **options: the keyword arguments of the preset: models, rewards, fields of `DecodeConfig`.

    `model.generate` passes the other arguments.

    Returns:
        Prompts and responses, int64 `[N, P + T]` on the device of `input_ids`, padded on the right;
        a `DecodedOutput` under `return_dict_in_generate=True`.

    Raises:
        InvalidArgument: a setting is wrong or has no meaning for the method; raised before any
            forward pass. The other errors are those of the preset.
    """
    heard = _streamer_of_generate()
    try:
        if heard is not None and streamer is not None:
            raise InvalidArgument(
                "streamer must be passed to model.generate or bound to tq_fast.generate, got both: "
                f"{heard!r} and {streamer!r}"
            )
        if generation_config is None:
            raise InvalidArgument(
                "tq_fast.generate is called by model.generate: pass it as custom_generate="
            )
        if method not in METHODS:
            names = ", ".join(map(repr, METHODS))
            raise InvalidArgument(f"method must be one of {names}, got {method!r}")
        call = _Call(model, input_ids, generation_config, method, options)
        call.check_processors(logits_processor or ())
        call.check_criteria(stopping_criteria or ())
        call.check_padding()
        is_begun = heard is not None
        result = call.run(heard if is_begun else streamer, is_begun=is_begun)
    finally:
        # Streamers hear the end of a call that fails, too: a thread that reads from one waits for
        # the next token until then.
        for listener in (heard, streamer):
            if listener is not None:
                listener.end()
    return call.output(result)


def _signature() -> inspect.Signature:
    """The signature by which transformers finds the keyword arguments that are not its own."""
    own = {name for method in METHODS for name in own_settings(method)}
    names = {*own, *MethodOptions.__optional_keys__, "baseline", "sft", "reward"}
    names -= {*_FROM_GENERATE, "template_options"}
    given = inspect.signature(generate)
    *named, rest = given.parameters.values()
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in sorted(names)
    ]
    return given.replace(parameters=[*named, *extra, rest])


generate.__signature__ = _signature()  # type: ignore[attr-defined]


def _streamer_of_generate() -> BaseStreamer | None:
    """The streamer that `model.generate` was called with, which has heard the prompt already.

    transformers (5.17 to 5.23) passes a callable everything but the streamer. It is a local
    variable of `generate`, which is on the stack.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("streamer")


class _Call:
    """One call of `generate`: its settings read and checked.

    Args:
        model: the one whose `generate` was called.
        input_ids: `[N, P]`, every prompt `num_return_sequences` times in a row.
        settings: the model's generation_config under what was passed to `generate`.
        method: the preset.
        options: its keyword arguments, and those that transformers passes to a model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        settings: GenerationConfig,
        method: str,
        options: Mapping[str, Any],
    ) -> None:
        self.model = model
        self.input_ids = input_ids
        self.settings = settings
        self.method = method
        known = inspect.signature(generate).parameters
        self.options = {name: value for name, value in options.items() if name in known}
        self.model_inputs = {name: value for name, value in options.items() if name not in known}
        self._check_inputs()
        self._check_settings()
        self.running = {
            name: self.options.pop(name)
            for name in RunOptions.__optional_keys__
            if name in self.options
        }
        self._take_settings()
        self._take_role()

    def _check_inputs(self) -> None:
        """Refuse what a model would read beside the ids of its prompts."""
        if self.model.config.is_encoder_decoder:
            raise UnsupportedModel(
                f"{type(self.model).__name__} is an encoder-decoder model; tq_fast decodes with "
                "decoders alone"
            )
        given = {name: value for name, value in self.model_inputs.items() if value is not None}
        for name in _CACHES:
            num_cached = given[name].get_seq_length() if name in given else 0
            if num_cached > 0:
                raise InvalidArgument(
                    f"{name} must be empty, got {num_cached} tokens: tq_fast encodes the whole "
                    "prompt"
                )
        for name in given:
            if name not in _OF_THE_LOOP:
                raise InvalidArgument(f"{name} is an input of the model that tq_fast does not pass")
        positions, mask = given.get("position_ids"), self._mask()
        if mask.shape != self.input_ids.shape:
            raise InvalidArgument(
                f"attention_mask must have the shape of input_ids, {tuple(self.input_ids.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        if positions is not None:
            expected = mask.long().cumsum(-1) - 1
            is_fitting = positions.shape in (expected.shape, expected[:1].shape)
            if not is_fitting or not (positions == expected)[mask].all():
                raise InvalidArgument(
                    "position_ids must be [N, P] and count the tokens of each prompt from 0, as "
                    f"attention_mask has them, got {positions.tolist()!r:.60}"
                )

    def _check_settings(self) -> None:
        """Refuse settings that were passed, and that mean nothing here."""
        if self.settings.num_beams > 1:
            raise InvalidArgument(
                f"num_beams must be 1, got {self.settings.num_beams}: tq_fast searches no beams; "
                "several responses of a prompt come by num_return_sequences"
            )
        own = self.model.generation_config
        for name, value in settings_that_choose(self.settings).items():
            if value == getattr(own, name, None) or name in _READ:
                continue
            if name not in SAMPLING_FIELDS:
                raise InvalidArgument(
                    f"{name}={value!r} is not read by tq_fast; leave it at its default"
                )
            field = sampling_field(self.method, name, value)
            if field in self.options:
                raise InvalidArgument(
                    f"{name}={value!r} and {field}={self.options[field]!r} are one setting; pass "
                    "one of them"
                )
            self.options[field] = value
        for name in _OUTPUTS:
            if getattr(self.settings, name, False):
                raise InvalidArgument(
                    f"{name} must be False: `result` of what return_dict_in_generate=True returns "
                    "has the traces"
                )

    def check_processors(self, processors: Any) -> None:
        """Refuse logits processors of the caller's own."""
        built = self.model._get_logits_processor(
            generation_config=self.settings,
            input_ids_seq_length=self.input_ids.shape[1],
            encoder_input_ids=self.input_ids,
            prefix_allowed_tokens_fn=None,
            logits_processor=LogitsProcessorList(),
            device=self.input_ids.device,
            model_kwargs={},
        )
        for kind in Counter(map(type, processors)) - Counter(map(type, built)):
            raise InvalidArgument(
                f"logits_processor must be empty, got {kind.__name__}: the law that tokens are "
                "drawn from is the method's"
            )

    def check_criteria(self, criteria: Any) -> None:
        """Take over the stop strings among the stopping criteria; refuse criteria of other kinds.

        Lengths and EOS are criteria of `generate` itself.
        """
        found: list[str] = []
        for one in criteria:
            if isinstance(one, StopStringCriteria):
                found += one.stop_strings
            elif not self._is_built(one):
                raise InvalidArgument(
                    f"stopping_criteria must be stop strings, got {type(one).__name__}: lengths, "
                    "eos_token_id and stop= end a response"
                )
        stop: Any = self.options.get("stop")
        if stop is None:
            stop = getattr(self.options.get("config"), "stop", ())
        self.options["stop"] = (*DecodeConfig(stop=stop).stop_strings, *found)

    def check_padding(self) -> None:
        """Refuse responses that may differ in length where there is no id to pad them with."""
        if self._pad_id() is None and self.options["stop"] and len(self.input_ids) > 1:
            raise InvalidArgument(
                f"pad_token_id is needed by {len(self.input_ids)} responses that stop strings end "
                "at several lengths, got None, and no eos_token_id to take its place"
            )

    def _is_built(self, criterion: Any) -> bool:
        """Whether `generate` has made a criterion from its settings."""
        if isinstance(criterion, MaxLengthCriteria):
            return bool(criterion.max_length == self.settings.max_length)
        is_end = isinstance(criterion, EosTokenCriteria)
        return is_end and set(criterion.eos_token_id.tolist()) == set(self._end_ids())

    def _take_settings(self) -> None:
        """Bring what `generate` says into the fields of a DecodeConfig."""
        settings, num_prompt = self.settings, self.input_ids.shape[1]
        least = settings.min_new_tokens
        if least is None:
            least = max(0, (settings.min_length or 0) - num_prompt)
        taken: dict[str, Any] = {
            "max_new_tokens": settings.max_length - num_prompt,
            "min_new_tokens": least,
            "eos_token_id": self._end_ids(),
            "num_return_sequences": settings.num_return_sequences,
        }
        if chooses_tokens(self.method):
            strategy = "sample" if settings.do_sample else "greedy"
            own = bool(self.model.generation_config.do_sample)
            given = self.options.get("strategy")
            if given not in (None, strategy) and bool(settings.do_sample) != own:
                raise InvalidArgument(
                    f"do_sample={settings.do_sample} contradicts strategy={given!r}; pass one"
                )
            if given is None:
                taken["strategy"] = strategy
        base, default = self.options.get("config"), DecodeConfig()
        for name, value in taken.items():
            before = getattr(base, name, None)
            if base is not None and before not in (getattr(default, name), value):
                raise InvalidArgument(
                    f"{name} is {value!r} by the settings of generate, and {before!r} in config; "
                    "pass it to generate"
                )
        self.options |= taken

    def _take_role(self) -> None:
        """Give the model the role that no other has."""
        options = self.options
        others = [name for name in ("baseline", "baselines") if options.get(name) is not None]
        # The prior that ARGS and value guidance draw from is the only model that they need.
        prior = options.get("prior") or ("sft" if self.method == "args" else None)
        has_none = self.method in ("sft", "controlled_decoding") or (
            self.method in ("args", "value_guided") and prior == "sft"
        )
        role = "sft" if others or has_none or options.get("source") == "sft" else "baseline"
        if options.get(role) is not None:
            names = " and ".join([*others, role])
            raise InvalidArgument(
                f"{names} cannot be passed for the method {self.method!r}: the model whose "
                f"generate is called is {role}"
            )
        options[role] = self.model

    def _mask(self) -> torch.Tensor:
        """Which ids are no padding, bool `[N, P]`."""
        mask = self.model_inputs.get("attention_mask")
        return torch.ones_like(self.input_ids).bool() if mask is None else mask.bool()

    def _end_ids(self) -> tuple[int, ...]:
        """The ids that end a response; `generate` takes an id, a list and a tensor."""
        ids = self.settings.eos_token_id
        return () if ids is None else tuple(torch.as_tensor(ids).long().flatten().tolist())

    def _pad_id(self) -> int | None:
        """What `generate` pads with: the first EOS where no other id is given."""
        pad = self.settings.pad_token_id
        return next(iter(self._end_ids()), None) if pad is None else int(pad)

    def run(self, streamer: BaseStreamer | None, *, is_begun: bool) -> DecodeResult:
        """Decode the prompts; `is_begun` says that the streamer has heard the prompt."""
        if streamer is not None and len(self.input_ids) != 1:
            raise InvalidArgument(
                f"streamer must be None for more than one response, got {len(self.input_ids)} "
                "responses"
            )
        if streamer is not None and self.running.get("progress"):
            raise InvalidArgument("progress must be False beside a streamer, got True")
        num = self.settings.num_return_sequences
        rows = zip(self.input_ids[::num], self._mask()[::num], strict=True)
        prompts = [ids[is_token].cpu() for ids, is_token in rows]
        opened = open_method(self.method, **self.options)
        if streamer is None:
            return opened.decode(prompts, **self.running)
        if not is_begun:
            streamer.put(self.input_ids.cpu())
        # The block frees the decode's buffers where the streamer raises.
        with opened.stream(prompts, memory_budget=self.running.get("memory_budget")) as stream:
            for token in stream:
                streamer.put(torch.tensor([token.token_id]))
        return stream.result

    def output(self, result: DecodeResult) -> torch.Tensor | DecodedOutput:
        """Return prompts and responses as `generate` does."""
        lengths = [len(ids) for ids in result.sequences]
        # Without an id to pad with, all responses have one length.
        new = self.input_ids.new_full((len(lengths), max(lengths)), self._pad_id() or 0)
        for row, ids in zip(new, result.sequences, strict=True):
            row[: len(ids)] = ids
        sequences = torch.cat([self.input_ids, new], dim=1)
        if self.settings.return_dict_in_generate:
            return DecodedOutput(sequences=sequences, result=result)
        return sequences
