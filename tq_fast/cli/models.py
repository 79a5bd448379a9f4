"""Options that name models and say how to load them, for every command that loads some."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from ..rewards.options import RewardOptions
from .options import (
    Command,
    describe,
    flag,
    read_devices,
    read_model_kwargs,
    replace_parameter,
)

_MODELS, _TOKENIZERS = "Models", "Tokenizers"
_READING, _LOADING = "What the reward reads", "How models are loaded"


def _model(help: str, metavar: str = "MODEL", panel: str = _MODELS) -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel=panel)


Baseline = Annotated[
    list[str] | None,
    _model(
        "The aligned model that rolls out. A folder, a hub id, or the URL of a server such as "
        "http://127.0.0.1:8000/v1, as for every model. Repeat for several (collab)."
    ),
]
Reward = Annotated[
    str | None,
    _model("The reward: a sequence classifier, or a Python function as MODULE:FUNCTION."),
]
Sft = Annotated[
    str | None,
    _model("The SFT model: the prior, and the log-ratio of indirect transfer."),
]
BaselineReward = Annotated[
    str | None,
    _model("The reward that the baseline was aligned to (indirect transfer)."),
]
Tokenizer = Annotated[
    str | None,
    _model("Of the language models. Default: the baseline's own.", panel=_TOKENIZERS),
]
RewardTokenizer = Annotated[
    str | None, _model("Of the reward. Default: its own.", panel=_TOKENIZERS)
]
BaselineRewardTokenizer = Annotated[
    str | None, _model("Of the baseline reward. Default: its own.", panel=_TOKENIZERS)
]
RewardIndex = Annotated[
    int | None,
    _model("Which label is the reward, where the model has several.", "N", _READING),
]
RewardBounds = Annotated[
    tuple[float, float] | None,
    _model(
        "Bounds of the reward: for the certificate, and roll-outs that can no longer matter are "
        "left out.",
        "LO HI",
        _READING,
    ),
]
RewardPair = Annotated[
    bool,
    flag("--reward-pair", panel=_READING, help="It reads prompt and response as a pair."),
]
RewardTruncate = Annotated[
    str | None,
    _model(
        "The side on which texts that are too long for it are cut. Default: they are refused.",
        "left|right",
        _READING,
    ),
]
RewardKeepSpecialTokens = Annotated[
    bool,
    flag(
        "--reward-keep-special-tokens",
        panel=_READING,
        help="It sees special tokens such as `<think>` in responses.",
    ),
]
Device = Annotated[
    list[str] | None,
    _model(
        "Where the models run, such as cuda:1, or one of them, such as baseline=cuda:1; repeat for "
        "several. Default: a GPU if there is one.",
        "[ROLE=]NAME",
        _LOADING,
    ),
]
ModelKwargs = Annotated[
    list[str] | None,
    _model(
        "More arguments of from_pretrained for one model, such as "
        '`baseline={"revision": "v2"}`; of a model behind a URL, fields of tq_fast.Server, such '
        'as `baseline={"model": "name"}`. Repeat for several.',
        "ROLE=JSON",
        _LOADING,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        rich_help_panel=_LOADING,
        **describe(
            "Of the weights; auto: as they were saved.",
            "auto",
            ("auto", "float32", "bfloat16", "float16"),
        ),
    ),
]


def _read_models(
    *,
    baseline: Baseline = None,
    reward: Reward = None,
    sft: Sft = None,
    baseline_reward: BaselineReward = None,
    tokenizer: Tokenizer = None,
    reward_tokenizer: RewardTokenizer = None,
    baseline_reward_tokenizer: BaselineRewardTokenizer = None,
    reward_index: RewardIndex = None,
    reward_bounds: RewardBounds = None,
    reward_pair: RewardPair = False,
    reward_truncate: RewardTruncate = None,
    reward_keep_special_tokens: RewardKeepSpecialTokens = False,
    device: Device = None,
    dtype: Dtype = "auto",
    model_kwargs: ModelKwargs = None,
) -> dict[str, Any]:
    """Return the fields of `ModelChoice` but the method's; of several baselines, a list."""
    given = dict(locals())
    reading = RewardOptions(
        pair=given.pop("reward_pair"),
        truncate=given.pop("reward_truncate"),
        keep_special_tokens=given.pop("reward_keep_special_tokens"),
    )
    return {
        **given,
        "reward_options": None if reading == RewardOptions() else reading,
        "device": read_devices(device or ()),
        "model_kwargs": read_model_kwargs(model_kwargs or ()),
    }


def takes_models(command: Command) -> Command:
    """Replace the parameter `models` of `command` by the options of this module.

    `command` gets a dict: the fields of `ModelChoice` but for the method's, and `baseline` as a
    list of the names that were given, or None.
    """
    options = list(inspect.signature(_read_models, eval_str=True).parameters.values())
    return replace_parameter(command, "models", options, lambda values: _read_models(**values))
