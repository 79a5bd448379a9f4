"""What is measured of each response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..prompts import Prompt
from ..results import DecodeResult, StepTrace
from ..transfer.certificate import known_ess
from .metrics import cosine, diversity, rep_n
from .models import LoadedModels


def measure_responses(
    prompts: Sequence[Prompt],
    result: DecodeResult,
    models: LoadedModels,
    *,
    seconds: float,
    cpu_seconds: float,
) -> list[dict[str, Any]]:
    """Return the measures of each response, None where one cannot be had.

    Words are split at white space; without text the token ids stand for them. Token-forwards and
    seconds are those of the whole group, shared out by the tokens of each response.

    Args:
        prompts: of the group.
        result: of the preset, which got exactly these prompts.
        models: of the set-up; "reward" is the target that all its methods are scored by.
        seconds: wall time of the group.
        cpu_seconds: CPU time of the process for the group, all its threads together.
    """
    ids = [sequence.tolist() for sequence in result.sequences]
    scores = {role: models.score(role, prompts, ids) for role in models.rewards}
    coherences = _coherences(prompts, result.texts, models)
    total = sum(map(len, ids))
    measured = []
    for idx, tokens in enumerate(ids):
        share = len(tokens) / total
        words = tokens if result.texts is None else result.texts[idx].split()
        measured.append(
            {
                **{role: scores[role][idx] for role in scores},
                **{f"rep_{n}": rep_n(words, n) for n in (2, 3, 4)},
                "diversity": diversity(words),
                "coherence": coherences[idx],
                "kl_to_sft": result.certificates[idx].kl_to_sft,
                **_trace_means(result.traces[idx]),
                "token_forwards": {
                    role: count * share for role, count in result.stats.token_forwards.items()
                },
                "seconds": seconds * share,
                "cpu_seconds": cpu_seconds * share,
            }
        )
    return measured


def _coherences(
    prompts: Sequence[Prompt], texts: Sequence[str] | None, models: LoadedModels
) -> list[float | None]:
    if models.embedder is None or texts is None:
        return [None] * len(prompts)
    asked = [_prompt_text(prompt) for prompt in prompts]
    vectors = models.embedder([*asked, *texts])
    pairs = zip(vectors[: len(asked)], vectors[len(asked) :], strict=True)
    return [cosine(first, second) for first, second in pairs]


def _prompt_text(prompt: Prompt) -> str:
    given = prompt.given
    if isinstance(given, str):
        return given
    # Messages: what was said, without the template. Token ids come here without a tokenizer only.
    return " ".join(str(message["content"]) for message in given)


def _trace_means(trace: Sequence[StepTrace]) -> dict[str, float | None]:
    """Means over steps and candidates of ESS, of the error of Q, and of the prior mass.

    Candidates with a single roll-out have neither of the first two.
    """
    values = {"ess": known_ess(trace), "q_stderr": [], "prior_mass": []}
    for step in trace:
        values["q_stderr"] += step.q_stderr.tolist()
        values["prior_mass"].append(step.prior_mass if len(step.candidates) > 1 else math.nan)
    means = {}
    for name, all_values in values.items():
        known = [value for value in all_values if math.isfinite(value)]
        means[name] = math.fsum(known) / len(known) if known else None
    return means
