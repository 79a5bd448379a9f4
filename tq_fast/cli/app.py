"""`tq-fast`: the command line. Only arguments are parsed here; `commands` does the work."""

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
from .options import takes_decode_options
from .terminal import one_line, say

app = typer.Typer(
    name="tq-fast",
    help="Transfer Q* decoding: steer a frozen language model toward a reward.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    # Errors of the package become one line (see main); others keep their own traceback.
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; an error of the package is one line and exit code 2."""
    try:
        app(prog_name="tq-fast")
    except TqFastError as error:
        say(Console(stderr=True), f"tq-fast: error: {one_line(str(error))}")
        sys.exit(2)


def _model_option(help: str, metavar: str = "MODEL") -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel="Models")


def _file_option(help: str) -> Any:
    return typer.Option(metavar="FILE", help=help, rich_help_panel="Prompts and output")


def _job_option(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Prompts and output")


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
    """Parse what stands before the command."""


@app.command()
@takes_decode_options
def decode(
    *,
    baseline: Annotated[
        str, _model_option("The aligned model that rolls out: a folder or a hub id.")
    ],
    reward: Annotated[
        str, _model_option("The reward: a sequence classifier, or a function as MODULE:FUNCTION.")
    ],
    sft: Annotated[
        str | None,
        _model_option("The SFT model: the prior, and the log-ratio of indirect transfer."),
    ] = None,
    baseline_reward: Annotated[
        str | None,
        _model_option("The reward that the baseline was aligned to (indirect transfer)."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        _model_option("The language models' tokenizer; not given: the baseline's own."),
    ] = None,
    reward_tokenizer: Annotated[
        str | None, _model_option("The reward's tokenizer; not given: its own.")
    ] = None,
    baseline_reward_tokenizer: Annotated[
        str | None, _model_option("The baseline reward's tokenizer; not given: its own.")
    ] = None,
    reward_index: Annotated[
        int | None,
        _model_option("Which label is the reward, where the reward model has several.", "N"),
    ] = None,
    reward_bounds: Annotated[
        tuple[float, float] | None,
        _model_option(
            "Bounds of the reward: for the certificate, and roll-outs that can no longer matter "
            "are left out.",
            "LO HI",
        ),
    ] = None,
    reward_pair: Annotated[
        bool,
        typer.Option(
            "--reward-pair",
            help="The reward reads prompt and response as a pair.",
            rich_help_panel="Models",
        ),
    ] = False,
    reward_truncate: Annotated[
        str | None,
        _model_option("Cut texts that are too long for the reward: left or right.", "WORD"),
    ] = None,
    reward_keep_special_tokens: Annotated[
        bool,
        typer.Option(
            "--reward-keep-special-tokens",
            help="The reward sees special tokens such as <think> in responses.",
            rich_help_panel="Models",
        ),
    ] = False,
    device: Annotated[
        str | None,
        _model_option("Where the models run; not given: a GPU if there is one.", "NAME"),
    ] = None,
    dtype: Annotated[
        str,
        _model_option("auto (as saved), float32, bfloat16 or float16.", "WORD"),
    ] = "auto",
    prompts: Annotated[
        str,
        _file_option(
            "Prompts: JSON lines with 'prompt' (text), 'messages' (chat) or 'token_ids', and "
            "perhaps 'id'; or one text a line. '-' is standard input."
        ),
    ],
    output: Annotated[
        Path, _file_option("JSON lines, one record a prompt, in the order in which they finish.")
    ],
    traces: Annotated[
        bool, _job_option("--traces/--no-traces", help="Put every step into the records.")
    ] = False,
    batch_size: Annotated[
        int,
        _job_option(
            "--batch-size",
            help="Prompts decoded together; results do not depend on it.",
            metavar="N",
        ),
    ] = 8,
    memory_budget: Annotated[
        int | None,
        _job_option(
            "--memory-budget",
            help="Bytes of KV and logits at most; what does not fit together runs in turn.",
            metavar="BYTES",
        ),
    ] = None,
    overwrite: Annotated[
        bool, _job_option("--overwrite", help="Start again, whatever the output holds.")
    ] = False,
    retry_errors: Annotated[
        bool, _job_option("--retry-errors", help="Decode again the prompts that failed.")
    ] = False,
    config: DecodeConfig,
) -> None:
    """Decode a file of prompts into JSON lines.

    Stopped at any moment, the same command goes on where it was. A prompt that fails becomes an
    error record, and the rest go on.

    Exit codes: 0, every prompt has a response; 1, some failed; 2, an argument is wrong or the
    output belongs to another job; 130, interrupted.
    """
    # torch and transformers take seconds to import, which help and usage errors need not wait for.
    from ..jobs.settings import ModelChoice
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
        device=device,
        dtype=dtype,
    )
    options = JobOptions(
        batch_size=batch_size,
        memory_budget=memory_budget,
        traces=traces,
        overwrite=overwrite,
        retry_errors=retry_errors,
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
def info() -> None:
    """Show what is installed and built, which backend each op uses, and why not the others."""
    from .info import show_info

    show_info(Console())


if __name__ == "__main__":
    main()
