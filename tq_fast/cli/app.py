"""`tq-fast`: the command line.

Arguments are parsed here; the modules of the same names carry the commands out. They are imported
by the commands, because torch and transformers take seconds to import, which help and usage errors
need not wait for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from .._version import read_version
from ..config import DecodeConfig
from ..errors import ServerUnavailable, TqFastError
from .methods import METHOD_NAMES, is_given, takes_own_settings
from .models import takes_models
from .options import describe, flag, read_template_options, takes_decode_options
from .terminal import one_line, say
from .workers import CpusPerWorker, GpusPerWorker, RayAddress, RayCommand, Workers, read_cluster


def _examples(*commands: str, links: Mapping[str, str]) -> str:
    """Return the end of a help text, in Markdown: examples, and pages of the documentation.

    Args:
        commands: as they would be typed, with line breaks where they are long.
        links: what stands on a page, by its place in the repository.
    """
    code = "\n".join(commands).replace("\n  ", " \\\n  ")
    pages = "\n".join(f"- {page}: {says}" for page, says in links.items())
    return f"For example:\n\n```sh\n{code}\n```\n\nIn the documentation:\n\n{pages}"


app = typer.Typer(
    name="tq-fast",
    epilog=_examples(
        "tq-fast demo",
        "tq-fast decode --help",
        links={"docs/index.md": "where to begin", "docs/cli/index.md": "every command"},
    ),
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
        typer.Option(
            "--version", callback=_show_version, is_eager=True, metavar="", help="Show the version."
        ),
    ] = False,
) -> None:
    """Parse the options that stand before the command."""


_FILES, _RECORDS, _MEMORY = "Prompts and output", "Records", "Prompts at a time"


def _output(*names: str, help: str, metavar: str, panel: str = _FILES) -> Any:
    return typer.Option(
        *names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False
    )


Method = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"How to decode: {', '.join(METHOD_NAMES)}. Default: transfer_q, or "
        "transfer_q_indirect with --transfer indirect.",
        rich_help_panel="Method",
    ),
]
Prompts = Annotated[
    str,
    _output(
        help="The prompts: JSON lines, or a JSON array, with prompt (text or messages), messages "
        "or token_ids, and perhaps id; other keys come back in the records. Or one text a "
        "line. '-' is standard input.",
        metavar="FILE",
    ),
]
Output = Annotated[
    Path,
    _output(
        help="The records: JSON lines, one a prompt, in the order in which they finish.",
        metavar="FILE",
    ),
]
Template = Annotated[
    str | None,
    _output(
        "--template-options",
        help="What chat templates get beside the messages (tools, enable_thinking and the like), "
        'such as `{"enable_thinking": false}`.',
        metavar="JSON",
    ),
]
Traces = Annotated[
    bool,
    flag(
        "--traces/--no-traces",
        panel=_RECORDS,
        help="Put every step into the records. Default: only what came of them.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        metavar="N",
        rich_help_panel=_MEMORY,
        **describe("Prompts decoded together; results do not depend on it.", 8),
    ),
]
MemoryBudget = Annotated[
    int | None,
    _output(
        help="Bytes of KV and logits at most; what does not fit together runs in turn. Default: as "
        "many as --batch-size takes.",
        metavar="BYTES",
        panel=_MEMORY,
    ),
]
Overwrite = Annotated[
    bool,
    flag("--overwrite", panel=_RECORDS, help="Start again, whatever the output holds."),
]
RetryErrors = Annotated[
    bool, flag("--retry-errors", panel=_RECORDS, help="Decode again the prompts that failed.")
]
MixVersions = Annotated[
    bool,
    flag(
        "--mix-versions",
        panel=_RECORDS,
        help="Go on with records that another version of tq-fast made.",
    ),
]

FitPrompts = Annotated[
    str | None,
    _output(
        help="The prompts, as for decode: other ones than those decoded later.", metavar="FILE"
    ),
]
FromRecords = Annotated[
    Path | None,
    _output(
        help="In the place of prompts: the records of an earlier job of best_of_n, whose texts "
        "serve again.",
        metavar="FILE",
    ),
]
HeadFolder = Annotated[
    Path, _output(help="Folder of the head, and of its texts (texts.jsonl).", metavar="DIR")
]


def _fit(help: str, default: int) -> Any:
    return typer.Option(metavar="N", rich_help_panel="Fit", **describe(help, default))


FitSource = Annotated[
    str,
    typer.Option(
        rich_help_panel="Fit",
        **describe(
            "The model that draws the texts: baseline (the direct Q of Transfer Q*) or sft "
            "(controlled decoding).",
            "sft",
            ("baseline", "sft"),
        ),
    ),
]
NumTexts = Annotated[int, _fit("Texts a prompt and round.", 8)]
Rounds = Annotated[
    int, _fit("2 adds texts that are drawn under the first head, at --alpha, and fits again.", 1)
]
Epochs = Annotated[int, _fit("Passes over all tokens.", 6)]
RewardStates = Annotated[
    bool,
    flag(
        "--reward-states",
        panel="Fit",
        help="The head reads the reward model's states, too: dearer, and closer to the reward.",
    ),
]
# The fields of the configuration that a fit reads.
FIT_FIELDS = (
    *("max_new_tokens", "min_new_tokens", "stop", "eos_token_id", "seed", "backend"),
    *("rollout_temperature", "rollout_top_k", "rollout_top_p", "alpha", "beta", "transfer"),
)


_DECODE_EXAMPLES = _examples(
    "tq-fast decode --baseline DIR --reward DIR --sft DIR\n"
    "  --prompts prompts.jsonl --output out.jsonl",
    "tq-fast decode --method best_of_n --n 16 --baseline DIR --reward DIR\n"
    "  --prompts prompts.jsonl --output out.jsonl",
    links={
        "docs/cli/decode.md": "the form of prompts and records",
        "docs/guide/choosing-a-method.md": "which method",
        "docs/guide/choosing-settings.md": "which settings",
    },
)


@app.command(cls=RayCommand, epilog=_DECODE_EXAMPLES)
@takes_own_settings
@takes_models
@takes_decode_options()
def decode(
    context: typer.Context,
    *,
    prompts: Prompts,
    output: Output,
    template_options: Template = None,
    models: dict[str, Any],
    method: Method = None,
    own: dict[str, Any],
    config: DecodeConfig,
    traces: Traces = False,
    overwrite: Overwrite = False,
    retry_errors: RetryErrors = False,
    mix_versions: MixVersions = False,
    batch_size: BatchSize = 8,
    memory_budget: MemoryBudget = None,
    workers: Workers = None,
    ray: RayAddress = None,
    gpus_per_worker: GpusPerWorker = None,
    cpus_per_worker: CpusPerWorker = None,
) -> None:
    """Decode a file of prompts into JSON lines.

    Before it begins it says how many tokens will go through each model; after the first steps, how
    long all prompts take. A method refuses the options of another one, and another value of a
    setting that it fixes; options of decoding that it does not read have no effect.

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


_FIT_EXAMPLES = _examples(
    "tq-fast fit-value --sft DIR --reward DIR --prompts train.jsonl --output head",
    "tq-fast decode --method value_guided --value head --sft DIR\n"
    "  --prompts prompts.jsonl --output out.jsonl",
    links={"docs/cli/fit-value.md": "what a head is fitted to, and what is printed"},
)


@app.command(name="fit-value", epilog=_FIT_EXAMPLES)
@takes_models
@takes_decode_options(*FIT_FIELDS, alpha=0.5)
def fit_value(
    *,
    output: HeadFolder,
    prompts: FitPrompts = None,
    from_records: FromRecords = None,
    template_options: Template = None,
    models: dict[str, Any],
    source: FitSource = "sft",
    num_texts: NumTexts = 8,
    rounds: Rounds = 1,
    epochs: Epochs = 6,
    reward_states: RewardStates = False,
    config: DecodeConfig,
    overwrite: Overwrite = False,
    retry_errors: RetryErrors = False,
    mix_versions: MixVersions = False,
    batch_size: BatchSize = 8,
    memory_budget: MemoryBudget = None,
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


def _demo(help: str, default: float) -> Any:
    return typer.Option(metavar="N" if isinstance(default, int) else "X", **describe(help, default))


_DEMO_EXAMPLES = _examples(
    "tq-fast demo",
    "tq-fast demo --prompts 2 --alpha 0.2 --num-rollouts 16",
    links={"docs/cli/demo-and-info.md": "what is shown"},
)


@app.command(epilog=_DEMO_EXAMPLES)
def demo(
    *,
    prompts: Annotated[int, _demo("Prompts to answer.", 4)] = 4,
    seed: Annotated[int, _demo("Seed of every random draw.", 0)] = 0,
    k: Annotated[int, _demo("Candidates per step.", 10)] = 10,
    alpha: Annotated[float, _demo("Decoding temperature; small follows the reward.", 0.5)] = 0.5,
    num_rollouts: Annotated[int, _demo("Roll-outs per candidate.", 8)] = 8,
) -> None:
    """Watch Transfer Q* steer the embedded models: responses side by side, scores, one trace."""
    from .demo import DemoOptions, run_demo

    options = DemoOptions(
        seed=seed, num_prompts=prompts, k=k, alpha=alpha, num_rollouts=num_rollouts
    )
    run_demo(options, Console())


_EVAL_EXAMPLES = _examples(
    "tq-fast eval tiny --output results",
    "tq-fast report results",
    links={
        "docs/cli/eval.md": "the configuration file, and the shipped recipes",
        "docs/cli/decode.md": "the form of records",
        "docs/results/measures.md": "what is measured",
    },
)


@app.command(name="eval", cls=RayCommand, epilog=_EVAL_EXAMPLES)
def evaluate(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="A TOML file, or a shipped recipe: tiny, tiny-ablations, frontier, real, or one "
            "of paper-*.",
        ),
    ],
    *,
    output: Annotated[
        Path, _output(help="The folder of results; it may be new.", metavar="DIR", panel=_RECORDS)
    ],
    overwrite: Overwrite = False,
    retry_errors: RetryErrors = False,
    mix_versions: MixVersions = False,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Processes. Default: as many as the configuration says.",
            rich_help_panel="Workers",
        ),
    ] = None,
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


_REPORT_EXAMPLES = _examples(
    "tq-fast report results",
    links={
        "docs/cli/eval.md": "what is made",
        "docs/results/measures.md": "what the numbers mean",
    },
)


@app.command(epilog=_REPORT_EXAMPLES)
def report(
    results: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of results of `tq-fast eval`.")
    ],
) -> None:
    """Make report.html, one file with all pictures and tables, and the pictures as PNG."""
    from .report import run_report

    run_report(results, Console(stderr=True))


_INFO_EXAMPLES = _examples(
    "tq-fast info",
    "tq-fast info --model DIR",
    links={"docs/cli/demo-and-info.md": "what is shown"},
)


@app.command(epilog=_INFO_EXAMPLES)
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
