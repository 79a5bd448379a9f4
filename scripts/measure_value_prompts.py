"""How a value head does on prompts unlike those that it was fitted on.

    python scripts/measure_value_prompts.py

On the embedded models under r_BL: a head is fitted on prompts about half of the places of the
grammar, and guides answers to other prompts about these places and to prompts about the others,
beside a head fitted on prompts about all. alpha is 0.25, one sampled response a prompt and seed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import tq_fast
from tq_fast.models.tiny import load_tiny_world, other_prompts
from tq_fast.models.tiny.grammar import PLACES
from tq_fast.presets import open_method
from tq_fast.values.head import ValueHead

NUM_FITTED, NUM_TEXTS, LENGTH, ALPHA = 192, 32, 48, 0.25
NUM_TESTED, SEEDS = 64, (0, 1, 2)
WORLD = load_tiny_world()


def fit(prompts: Sequence[str]) -> ValueHead:
    """A head fitted on texts of the baseline."""
    return tq_fast.fit_value(
        list(prompts),
        sft=WORLD.sft,
        baseline=WORLD.baseline,
        reward=WORLD.baseline_reward,
        source="baseline",
        num_texts=NUM_TEXTS,
        max_new_tokens=LENGTH,
        batch_size=16,
    )


def measure(method: str, prompts: Sequence[str], **own: object) -> tuple[float, float, float]:
    """Mean reward, its standard error over prompts, and mean divergence to SFT, nats."""
    by_prompt: list[list[float]] = [[] for _ in prompts]
    divergences = []
    for seed in SEEDS:
        opened = open_method(
            method,
            sft=WORLD.sft,
            reward=WORLD.baseline_reward,
            alpha=ALPHA,
            max_new_tokens=LENGTH,
            seed=seed,
            **own,
        )
        result = opened.decode(list(prompts), batch_size=16)
        for rewards, trace in zip(by_prompt, result.traces, strict=True):
            rewards.append(float(trace[0].rewards.max()))
        divergences += [certificate.kl_to_sft for certificate in result.certificates]
    means = [statistics.mean(rewards) for rewards in by_prompt]
    error = statistics.stdev(means) / len(means) ** 0.5
    return statistics.mean(means), error, statistics.mean(divergences)


def main() -> None:
    """Print the table."""
    places = sorted(PLACES)
    first = places[: len(places) // 2]
    every = other_prompts(2_000)
    known = [prompt for prompt in every if any(place in prompt for place in first)]
    unknown = [prompt for prompt in every if not any(place in prompt for place in first)]
    tested = {"places of the fit": known[-NUM_TESTED:], "other places": unknown[-NUM_TESTED:]}
    heads = {
        f"head, {len(first)} of {len(places)} places": fit(known[:NUM_FITTED]),
        "head, all places": fit(every[:NUM_FITTED]),
    }
    print(f"places of the fit: {', '.join(first)}")
    print("| method | prompts about | reward | s.e. | KL to SFT, nats |")
    print("| --- | --- | --- | --- | --- |")
    for where, prompts in tested.items():
        rows = {"SFT": measure("best_of_n", prompts, source="sft", n=1)}
        for name, head in heads.items():
            rows[name] = measure("value_guided", prompts, value=head)
        for name, (reward, error, divergence) in rows.items():
            print(f"| {name} | {where} | {reward:.2f} | {error:.2f} | {divergence:.2f} |")


if __name__ == "__main__":
    main()
