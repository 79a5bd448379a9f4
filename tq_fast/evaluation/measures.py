"""Measures of single responses, those of the paper among them (arXiv 2405.20495, section 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..prompts import Prompt
from ..results import DecodeResult, StepTrace
from ..transfer.certificate import known_ess
from .models import LoadedModels


def measure_responses(
    prompts: Sequence[Prompt],
    result: DecodeResult,
    models: LoadedModels,
    *,
    seconds: float,
    cpu_seconds: float,
) -> list[dict[str, Any]]:
    """Return the measures of each response; one that cannot be computed is None.

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
    # The contents of chat messages are joined, without the template. Token ids stand in a prompt
    # only where there is no tokenizer, and then no response has a text to compare with.
    contents = [message["content"] for message in given if not isinstance(message, int)]
    return " ".join(map(str, contents))


def _trace_means(trace: Sequence[StepTrace]) -> dict[str, float | None]:
    """Return means over steps and candidates of ESS, of the error of Q, and of the prior mass.

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


def rep_n(words: Sequence[Any], n: int) -> float:
    """Return `100 (1 - unique n-grams / (n-grams + 1))`, in per cent.

    With the paper's `+ 1` a text without repetition is a little above 0, and one of fewer than n
    words has 100: very short texts count as repetitive.

    Args:
        words: words, or token ids.
        n: length of an n-gram, at least 1.
    """
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 100.0 * (1.0 - len(set(ngrams)) / (len(ngrams) + 1))


def diversity(words: Sequence[Any]) -> float:
    """Return the product over n = 2, 3, 4 of `1 - rep_n / 100`, in [0, 1)."""
    return math.prod(1.0 - rep_n(words, n) / 100.0 for n in (2, 3, 4))


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the cosine of two embeddings; coherence is its mean over prompts and responses.

    0 where an embedding is the zero vector.
    """
    dot = math.fsum(a * b for a, b in zip(first, second, strict=True))
    norms = math.hypot(*first) * math.hypot(*second)
    return dot / norms if norms > 0.0 else 0.0


def compare_scores(ours: float, theirs: float) -> float:
    """Return 1 where a judge scores our response at least as high as theirs, else 0.

    The mean of this is the win-tie rate.
    """
    return float(ours >= theirs)
