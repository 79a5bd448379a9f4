"""Fields of a model's generation_config that are set and that tq_fast does not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from ..errors import warn_caller

# Fields that change which tokens `generate` chooses. Lengths in tokens, caches and what `generate`
# returns are left out: no response differs for them.
_FIELDS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "constraints",
    "diversity_penalty",
    "dola_layers",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "guidance_scale",
    "length_penalty",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "penalty_alpha",
    "repetition_penalty",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "temperature",
    "token_healing",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
    "watermarking_config",
)
# Values that say nothing: the defaults of transformers, and what switches a field off.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1.0,),
    "length_penalty": (1.0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1.0,),
    "temperature": (1.0,),
    "top_h": (1.0,),
    "top_k": (0, 50),
    "top_p": (1.0,),
    "typical_p": (1.0,),
}


def ignored_settings(model: PreTrainedModel) -> dict[str, Any]:
    """Fields of the model's generation_config that ask for something, and are not read."""
    return settings_that_choose(getattr(model, "generation_config", None))


def settings_that_choose(settings: GenerationConfig | None) -> dict[str, Any]:
    """Return the fields that change which tokens `generate` chooses, where they say something."""
    found = {name: getattr(settings, name, None) for name in _FIELDS}
    return {
        name: value
        for name, value in found.items()
        if value and value not in _NEUTRAL.get(name, ())
    }


def warn_of_ignored(models: Mapping[Any, PreTrainedModel]) -> None:
    """Warn once a model, naming what its generation_config asks for in vain."""
    for role, model in {id(model): (role, model) for role, model in models.items()}.values():
        ignored = ignored_settings(model)
        if ignored:
            named = ", ".join(f"{name}={value!r:.40}" for name, value in ignored.items())
            warn_caller(
                f"{role}: the model's generation_config sets {named}, which is not read; the "
                "settings of DecodeConfig alone count, such as rollout_temperature, stop and "
                "min_new_tokens"
            )
