"""The card of the embedded world; every figure in it is measured by ``measure.py``."""

from pathlib import Path

from safetensors import safe_open

from .measure import NUM_SAMPLES, SCORERS, WorldScores

_NAMES = {"sft": "SFT model", "baseline": "baseline"}


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _score_table(scores: WorldScores) -> str:
    rows = []
    for name, policy in scores.policies.items():
        for label, averages in (
            ("one sample", policy.single),
            (f"best of {NUM_SAMPLES} under r", policy.best_under_r),
        ):
            rows.append([f"{_NAMES[name]}, {label}", *(str(averages[key]) for key in SCORERS)])
    return _table(["", *SCORERS], rows)


def _habit_table(scores: WorldScores) -> str:
    rows = [
        [
            _NAMES[name],
            f"{policy.mean_length:.1f}",
            f"{100 * policy.ended:.1f} %",
            f"{policy.entropy:.2f}",
            f"{policy.choices:.1f}",
            str(policy.kl_to_sft),
        ]
        for name, policy in scores.policies.items()
    ]
    header = [
        "", "tokens a response", "reach EOS", "entropy a token (nats)",
        "effective choices a token", "KL to SFT a response (nats)",
    ]  # fmt: skip
    return _table(header, rows)


def _num_parameters(weights: Path) -> int:
    with safe_open(weights / "sft" / "model.safetensors", framework="pt") as tensors:
        return sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118


def write_card(
    output: Path, scores: WorldScores, beta: float, num_prompts: int, minutes: float
) -> None:
    """Write ``README.md`` into ``output``."""
    weights = output / "weights"
    size = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    text = f"""# The embedded world

Four tiny models over a synthetic language, and the truth about it, so that the demo, the tests and
the evaluation of tq_fast run anywhere, without a download. `scripts/train_tiny_models.py`
(`make tiny-models`) trains all of it from nothing and writes this card; the figures below were
measured by that script.

## What it is

The language is short reviews of places to eat and to stay. A prompt names a place and two of its
aspects; a response is a few sentences. `grammar.py` holds every sentence form, writes the training
text and reads responses back, so what a response says is known exactly.

| folder | what | trained with |
| --- | --- | --- |
| `weights/sft` | language model: Llama, {_num_parameters(weights) / 1e6:.2f} M parameters, 3 layers | TRL `SFTTrainer` on reviews of mixed quality, some with slips |
| `weights/reward` | r, the target reward: prefers helpful answers | TRL `RewardTrainer` on pairs that the helpful reader chose |
| `weights/baseline_reward` | r_BL: prefers friendly answers | the same, pairs that the friendly reader chose |
| `weights/baseline` | language model aligned to r_BL, beta = {beta} | TRL `DPOTrainer` on pairs of SFT samples; sigmoid(r_BL difference) chooses |

The *helpful* reader wants the two aspects that were asked for, figures (price, waiting time,
rating) and a tip; the *friendly* reader wants praise, thanks and enthusiasm. Both want the question
answered in whole sentences and dislike rudeness, slips and repetition. `gold.py` holds both scores
exactly: `gold_reward` (helpful, the truth behind r) and `baseline_gold_reward` (friendly, behind
r_BL). The readers choose with the noise of the Bradley-Terry model. The heads of the reward models
are scaled so that each reward has standard deviation 1 over samples of the SFT model; so alpha = 1
trades one standard deviation of reward for one nat.

All four share one tokenizer (byte-level BPE in which every word of the grammar is one token; any
other text round-trips too), put `<s>` in front and end with `</s>`. Weights are stored as fp16 and
load as fp32. Everything together is {size / 1e6:.1f} MB.

## What it scores

Mean over {num_prompts} prompts that no model was trained on, {NUM_SAMPLES} samples each at
temperature 1; ± is the standard error over prompts. "gold" is the exact score in code.

{_score_table(scores)}

{_habit_table(scores)}

Over the samples of the SFT model:

- standard deviation of r {scores.reward_sd["r"]:.2f}, of r_BL {scores.reward_sd["r_BL"]:.2f}
- rank correlation of r and r_BL {scores.rank_r_baseline_reward:.2f}: they agree in part
- rank correlation of r and its gold {scores.rank_r_gold:.2f}, of r_BL and its gold {scores.rank_baseline_reward_gold:.2f}

## Limits

The models speak this language only; ask them something else and they answer with a review. The
reward models are small and imperfect: compare the model reward with the gold one before believing
a gain. Training on another machine or with another thread count gives slightly different weights.

Training took {minutes:.0f} minutes of wall time on the machine that made these files.
"""
    (output / "README.md").write_text(text, encoding="utf-8")
