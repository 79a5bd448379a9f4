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

from .._version import read_version
from ..config import DecodeConfig
from ..errors import ServerUnavailable, TqFastError
from .methods import METHOD_NAMES, is_given, takes_own_settings
from .models import takes_models
from .options import read_template_options, takes_decode_options
from .terminal import one_line, say
from .workers import CpusPerWorker, GpusPerWorker, RayAddress, RayCommand, Workers, read_cluster

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
    """Run the command line; an error of the package is one line and exit code 2.

    A model server that stays away has an exit code of its own, 3: the same command may do later.
    """
    try:
        app(prog_name="tq-fast")
    except TqFastError as error:
        say(Console(stderr=True), f"tq-fast: error: {one_line(str(error))}")
        sys.exit(3 if isinstance(error, ServerUnavailable) else 2)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tq-fast {read_version()}")
        raise typer.Exit


@app.callback()
def tq_fast(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Parse the options that stand before the command."""


def _output(*names: str, help: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel="Prompts and output")


Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"How to decode: {', '.join(METHOD_NAMES)}. Not given: transfer_q, or "
        "transfer_q_indirect with --transfer indirect.",
        rich_help_panel="Method",
    ),
]
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
MixVersions = Annotated[
    bool,
    _output("--mix-versions", help="Go on with records that another version of tq-fast made."),
]

FitPrompts = Annotated[
    str | None,
    _output(help="Prompts, as for decode: other ones than those decoded later.", metavar="FILE"),
]
FromRecords = Annotated[
    Path | None,
    _output(
        help="Fit to the records of an earlier job of best_of_n instead of drawing texts.",
        metavar="FILE",
    ),
]
HeadFolder = Annotated[
    Path, _output(help="Folder of the head, and of its texts (texts.jsonl).", metavar="DIR")
]


def _fit(help: str, metavar: str = "N") -> Any:
    return typer.Option(metavar=metavar, help=help, rich_help_panel="Fit")


FitSource = Annotated[
    str,
    _fit(
        "The model that draws the texts: baseline (the direct Q of Transfer Q*) or sft "
        "(controlled decoding).",
        "WORD",
    ),
]
NumTexts = Annotated[int, _fit("Texts a prompt and round.")]
Rounds = Annotated[
    int, _fit("2 adds texts that are drawn under the first head, at --alpha, and fits again.")
]
Epochs = Annotated[int, _fit("Passes over all tokens.")]
RewardStates = Annotated[
    bool,
    typer.Option(
        "--reward-states",
        help="The head reads the reward model's states, too: dearer, and closer to the reward.",
        rich_help_panel="Fit",
    ),
]
# The fields of the configuration that a fit reads.
FIT_FIELDS = (
    *("max_new_tokens", "min_new_tokens", "stop", "eos_token_id", "seed", "backend"),
    *("rollout_temperature", "rollout_top_k", "rollout_top_p", "alpha", "beta", "transfer"),
)


@app.command(cls=RayCommand)
@takes_own_settings
@takes_models
@takes_decode_options()
def decode(
    context: typer.Context,
    *,
    method: Method = None,
    own: dict[str, Any],
    models: dict[str, Any],
    prompts: Prompts,
    output: Output,
    template_options: Template = None,
    traces: Traces = False,
    batch_size: BatchSize = 8,
    memory_budget: MemoryBudget = None,
    overwrite: Overwrite = False,
    retry_errors: RetryErrors = False,
    mix_versions: MixVersions = False,
    workers: Workers = None,
    ray: RayAddress = None,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
    config: DecodeConfig,
) -> None:
    """Decode a file of prompts into JSON lines.

    A method refuses the options of another one, and another value of a setting that it fixes;
    options of decoding that it does not read have no effect.

    Stopped at any moment, the same command goes on where it was. A prompt that fails becomes an
    error record, and the rest go on. A worker that dies is started again.

    Exit codes: 0, every prompt has a response; 1, some failed; 2, an argument is wrong or the
    output belongs to another job; 3, a model server stayed away; 130, interrupted.
    """
    from .decode import choose_models, run_decode
    from .job import JobOptions

    explicit = {name for name in vars(config) if is_given(context, name)}
    choice = choose_models(method, config, models, own, explicit)
    options = JobOptions(
        batch_size=batch_size,
        memory_budget=memory_budget,
        traces=traces,
        overwrite=overwrite,
        retry_errors=retry_errors,
        mix_versions=mix_versions,
        template_options=read_template_options(template_options),
        cluster=read_cluster(workers, ray, gpus_per_worker, cpus_per_worker),
    )
    raise typer.Exit(run_decode(config, choice, prompts, output, options, Console(stderr=True)))


@app.command(name="fit-value")
@takes_models
@takes_decode_options(*FIT_FIELDS, alpha=0.5)
def fit_value(
    *,
    models: dict[str, Any],
    prompts: FitPrompts = None,
    from_records: FromRecords = None,
    output: HeadFolder,
    template_options: Template = None,
    batch_size: BatchSize = 8,
    memory_budget: MemoryBudget = None,
    overwrite: Overwrite = False,
    retry_errors: RetryErrors = False,
    mix_versions: MixVersions = False,
    source: FitSource = "sft",
    num_texts: NumTexts = 8,
    rounds: Rounds = 1,
    epochs: Epochs = 6,
    reward_states: RewardStates = False,
    config: DecodeConfig,
) -> None:
    """Fit a value head, for value guidance: draw texts, score them, learn to foretell the scores.

    The prior that the head will guide is the SFT model, or the baseline without one. The texts are
    the records of a job of best_of_n, which goes on where it was stopped.

    Exit codes are those of decode.
    """
    from .fit_value import FitJob, run_fit_value
    from .job import JobOptions

    options = JobOptions(
        batch_size=batch_size,
        memory_budget=memory_budget,
        overwrite=overwrite,
        retry_errors=retry_errors,
        mix_versions=mix_versions,
        template_options=read_template_options(template_options),
    )
    job = FitJob(
        prompts=prompts,
        from_records=from_records,
        output=output,
        source=cast(Any, source),
        num_texts=num_texts,
        rounds=rounds,
        epochs=epochs,
        reward_states=reward_states,
    )
    raise typer.Exit(run_fit_value(config, models, job, options, Console(stderr=True), Console()))


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


@app.command(name="eval", cls=RayCommand)
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
    mix_versions: Annotated[
        bool,
        typer.Option("--mix-versions", help="Go on with records that another version made."),
    ] = False,
    ray: RayAddress = None,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
) -> None:
    """Compare methods: every prompt, seed and method a record, and tables with intervals.

    Stopped at any moment, the same command goes on where it was. A prompt that fails becomes an
    error record, and the rest go on.

    Exit codes: 0, every prompt has a response by every method; 1, some failed; 2, the configuration
    is wrong or the output belongs to another evaluation; 3, a model server stayed away; 130,
    interrupted.
    """
    from .evaluate import EvalOptions, run_eval

    options = EvalOptions(
        workers=workers,
        overwrite=overwrite,
        retry_errors=retry_errors,
        mix_versions=mix_versions,
        cluster=read_cluster(None, ray, gpus_per_worker, cpus_per_worker),
    )
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
