"""`tq-fast`: the command line.

Arguments are parsed here; the modules of the same names carry the commands out. They are imported
by the commands, because torch and transformers take seconds to import, which help and usage errors
need not wait for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from .._version import __version__
from ..config import DecodeConfig
from ..errors import TqFastError
from ..rewards.options import RewardOptions
from .options import read_devices, read_model_kwargs, read_template_options, takes_decode_options
from .terminal import one_line, say

app = typer.Typer(
    name="tq-fast",
    help="Transfer Q* decoding: steer a frozen language model toward a reward.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    # main() makes one line of an error of the package; any other error keeps its own traceback.
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; an error of the package is one line and exit code 2."""
    try:
        app(prog_name="tq-fast")
    except TqFastError as error:
        say(Console(stderr=True), f"tq-fast: error: {one_line(str(error))}")
        sys.exit(2)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tq-fast {__version__}")
        raise typer.Exit


@app.callback()
def tq_fast(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Parse the options that stand before the command."""


def _model(help: str, metavar: str = "MODEL") -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel="Models")


def _output(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Prompts and output")


Baseline = Annotated[str, _model("The aligned model that rolls out: a folder or a hub id.")]
Reward = Annotated[
    str, _model("The reward: a sequence classifier, or a function as MODULE:FUNCTION.")
]
Sft = Annotated[
    str | None, _model("The SFT model: the prior, and the log-ratio of indirect transfer.")
]
BaselineReward = Annotated[
    str | None, _model("The reward that the baseline was aligned to (indirect transfer).")
]
Tokenizer = Annotated[
    str | None, _model("The language models' tokenizer; not given: the baseline's own.")
]
RewardTokenizer = Annotated[str | None, _model("The reward's tokenizer; not given: its own.")]
BaselineRewardTokenizer = Annotated[
    str | None, _model("The baseline reward's tokenizer; not given: its own.")
]
RewardIndex = Annotated[
    int | None, _model("Which label is the reward, where the reward model has several.", "N")
]
RewardBounds = Annotated[
    tuple[float, float] | None,
    _model(
        "Bounds of the reward: for the certificate, and roll-outs that can no longer matter are "
        "left out.",
        "LO HI",
    ),
]
RewardPair = Annotated[
    bool,
    typer.Option(
        "--reward-pair",
        help="The reward reads prompt and response as a pair.",
        rich_help_panel="Models",
    ),
]
RewardTruncate = Annotated[
    str | None, _model("Cut texts that are too long for the reward: left or right.", "WORD")
]
RewardKeepSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--reward-keep-special-tokens",
        help="The reward sees special tokens such as <think> in responses.",
        rich_help_panel="Models",
    ),
]
Device = Annotated[
    list[str] | None,
    _model(
        "Where the models run, or one of them, such as 'baseline=cuda:1'; repeat for several. "
        "Not given: a GPU if there is one.",
        "[ROLE=]NAME",
    ),
]
ModelKwargs = Annotated[
    list[str] | None,
    _model(
        "More arguments of from_pretrained for one model, such as "
        '\'baseline={"revision": "v2"}\'; repeat for several.',
        "ROLE=JSON",
    ),
]
Dtype = Annotated[str, _model("auto (as saved), float32, bfloat16 or float16.", "WORD")]
Prompts = Annotated[
    str,
    _output(
        help="Prompts: JSON lines, or a JSON array, with 'prompt' (text or messages), 'messages' "
        "or 'token_ids', and perhaps 'id'; other keys come back in the records. Or one text a "
        "line. '-' is standard input.",
        metavar="FILE",
    ),
]
Output = Annotated[
    Path,
    _output(
        help="JSON lines, one record a prompt, in the order in which they finish.", metavar="FILE"
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template-options",
        help="What chat templates get beside the messages: tools, enable_thinking and the like.",
        metavar="JSON",
        rich_help_panel="Prompts and output",
    ),
]
Traces = Annotated[bool, _output("--traces/--no-traces", help="Put every step into the records.")]
BatchSize = Annotated[
    int,
    _output(help="Prompts decoded together; results do not depend on it.", metavar="N"),
]
MemoryBudget = Annotated[
    int | None,
    _output(
        help="Bytes of KV and logits at most; what does not fit together runs in turn.",
        metavar="BYTES",
    ),
]
Overwrite = Annotated[bool, _output("--overwrite", help="Start again, whatever the output holds.")]
RetryErrors = Annotated[
    bool, _output("--retry-errors", help="Decode again the prompts that failed.")
]


@app.command()
@takes_decode_options
def decode(
    *,
    baseline: Baseline,
    reward: Reward,
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
    prompts: Prompts,
    output: Output,
    template_options: Template = None,
    traces: Traces = False,
    batch_size: BatchSize = 8,
    memory_budget: MemoryBudget = None,
    overwrite: Overwrite = False,
    retry_errors: RetryErrors = False,
    config: DecodeConfig,
) -> None:
    """Decode a file of prompts into JSON lines.

    Stopped at any moment, the same command goes on where it was. A prompt that fails becomes an
    error record, and the rest go on.

    Exit codes: 0, every prompt has a response; 1, some failed; 2, an argument is wrong or the
    output belongs to another job; 130, interrupted.
    """
    from ..jobs.resume import ModelChoice
    from .decode import JobOptions, run_decode

    reading = RewardOptions(
        pair=reward_pair,
        truncate=cast(Any, reward_truncate),
        keep_special_tokens=reward_keep_special_tokens,
    )
    models = ModelChoice(
        baseline=baseline,
        reward=reward,
        sft=sft,
        baseline_reward=baseline_reward,
        tokenizer=tokenizer,
        reward_tokenizer=reward_tokenizer,
        baseline_reward_tokenizer=baseline_reward_tokenizer,
        reward_index=reward_index,
        reward_bounds=reward_bounds,
        reward_options=None if reading == RewardOptions() else reading,
        device=read_devices(device or ()),
        dtype=dtype,
        model_kwargs=read_model_kwargs(model_kwargs or ()),
    )
    options = JobOptions(
        batch_size=batch_size,
        memory_budget=memory_budget,
        traces=traces,
        overwrite=overwrite,
        retry_errors=retry_errors,
        template_options=read_template_options(template_options),
    )
    raise typer.Exit(run_decode(config, models, prompts, output, options, Console(stderr=True)))


@app.command()
def demo(
    *,
    prompts: Annotated[int, typer.Option(metavar="N", help="Prompts to answer.")] = 4,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of every random draw.")] = 0,
    k: Annotated[int, typer.Option(metavar="N", help="Candidates per step.")] = 10,
    alpha: Annotated[
        float, typer.Option(metavar="X", help="Decoding temperature; small follows the reward.")
    ] = 0.5,
    num_rollouts: Annotated[int, typer.Option(metavar="N", help="Roll-outs per candidate.")] = 8,
) -> None:
    """Watch Transfer Q* steer the embedded models: responses side by side, scores, one trace."""
    from .demo import DemoOptions, run_demo

    options = DemoOptions(
        seed=seed, num_prompts=prompts, k=k, alpha=alpha, num_rollouts=num_rollouts
    )
    run_demo(options, Console())


@app.command(name="eval")
def evaluate(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A TOML file, or a recipe such as 'tiny'.")
    ],
    *,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder of results; it may be new.")
    ],
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", help="Processes; not given: as the configuration says."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again, whatever the output holds.")
    ] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Decode again the prompts that failed.")
    ] = False,
) -> None:
    """Compare methods: every prompt, seed and method a record, and tables with intervals.

    Stopped at any moment, the same command goes on where it was. A prompt that fails becomes an
    error record, and the rest go on.

    Exit codes: 0, every prompt has a response by every method; 1, some failed; 2, the configuration
    is wrong or the output belongs to another evaluation; 130, interrupted.
    """
    from .evaluate import EvalOptions, run_eval

    options = EvalOptions(workers=workers, overwrite=overwrite, retry_errors=retry_errors)
    raise typer.Exit(run_eval(config, output, options, Console(stderr=True)))


@app.command()
def report(
    results: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of results of `tq-fast eval`.")
    ],
) -> None:
    """Make report.html, one file with all pictures and tables, and the pictures as PNG."""
    from .report import run_report

    run_report(results, Console(stderr=True))


@app.command()
def info(
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Say, too, how the layers of this model run."),
    ] = None,
) -> None:
    """Show what is installed and built, which backend each op uses, and why not the others."""
    from .info import show_info

    show_info(Console(), model)


if __name__ == "__main__":
    main()
