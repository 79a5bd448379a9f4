"""Train the embedded world from nothing: ``python scripts/train_tiny_models.py``.

It writes tokenizer, models, prompts and card into ``tq_fast/models/tiny/``. Two CPU cores are
enough; the card says how long it took. Every step has its own seed.
"""

import argparse
import json
import logging
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import card, corpus, measure, preferences, sampling, training
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tq_fast.models.tiny.gold import baseline_gold_reward, gold_reward

OUTPUT = Path(__file__).resolve().parents[1] / "tq_fast" / "models" / "tiny"
MODELS = ("sft", "reward", "baseline_reward", "baseline")
JUDGES = {"reward": gold_reward, "baseline_reward": baseline_gold_reward}
BETA = 0.5
NUM_EVALUATION, NUM_DEMO = 64, 6
NUM_REVIEWS = 64_000
NUM_SAMPLED_PROMPTS, SAMPLES_PER_PROMPT = 4_000, 4
NUM_REWARD_PAIRS = 30_000

logger = logging.getLogger("train_tiny_models")


def train_language_model(prompts: Sequence[str], num_reviews: int, folder: Path) -> None:
    """Write reviews with the grammar, train the tokenizer and the SFT model on them."""
    rng = random.Random(1)
    asked = [rng.choice(prompts) for _ in range(num_reviews)]
    reviews = [corpus.write_review(prompt, corpus.SFT_STYLE, rng) for prompt in asked]
    tokenizer = training.train_tokenizer([p + r for p, r in zip(asked, reviews, strict=True)])
    training.train_sft(asked, reviews, tokenizer, folder, seed=1)
    tokenizer.save_pretrained(folder)


def sample_sft(
    work: Path, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[list[str]]:
    """Draw several responses of the SFT model to each prompt."""
    model = sampling.load_lm(work / "sft")
    draws = [
        sampling.sample(model, tokenizer, prompts, seed=10 + i).texts
        for i in range(SAMPLES_PER_PROMPT)
    ]
    return [list(texts) for texts in zip(*draws, strict=True)]


def train_reward_model(
    name: str,
    work: Path,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    samples: Sequence[list[str]],
    num_pairs: int,
) -> None:
    """Train one reward model; scale it to standard deviation 1 over samples of the SFT model."""
    rng = random.Random(f"pairs of {name}")
    pairs = preferences.reward_pairs(prompts, samples, JUDGES[name], tokenizer, num_pairs, rng)
    folder = work / name
    training.train_reward(
        pairs.chosen_ids, pairs.rejected_ids, tokenizer, work / "sft", folder, seed=2
    )
    scores = sampling.score(folder, tokenizer, prompts, [texts[0] for texts in samples])
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"] /= statistics.stdev(scores)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def train_baseline(
    work: Path,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    samples: Sequence[list[str]],
) -> None:
    """Align the SFT model to r_BL by DPO on its own samples."""
    asked = [prompt for prompt, texts in zip(prompts, samples, strict=True) for _ in texts]
    answers = [text for texts in samples for text in texts]
    flat = sampling.score(work / "baseline_reward", tokenizer, asked, answers)
    size = SAMPLES_PER_PROMPT
    rewards = [flat[i : i + size] for i in range(0, len(flat), size)]
    pairs = preferences.policy_pairs(prompts, samples, rewards, random.Random(4))
    training.train_dpo(
        pairs.prompts, pairs.chosen, pairs.rejected, tokenizer, work / "sft", work / "baseline",
        BETA, seed=3,
    )  # fmt: skip


def store(source: Path, target: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Store configuration, tokenizer and weights, rounded to fp16 and to be loaded as fp32."""
    target.mkdir(parents=True)
    for name in ("config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    weights = load_file(source / "model.safetensors")
    halves = {name: tensor.to(torch.float16) for name, tensor in weights.items()}
    save_file(halves, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(target)


def train_world(work: Path, output: Path, scale: float) -> None:
    """Run every step in ``work``, then replace the data in ``output``."""
    started = time.monotonic()
    prompts = corpus.make_prompts(random.Random(0), NUM_EVALUATION, NUM_DEMO)
    logger.info("SFT")
    train_language_model(prompts.train, int(NUM_REVIEWS * scale), work / "sft")
    tokenizer = AutoTokenizer.from_pretrained(work / "sft")
    logger.info("samples of the SFT model")
    asked = random.Random(2).sample(prompts.train, int(NUM_SAMPLED_PROMPTS * scale))
    samples = sample_sft(work, tokenizer, asked)
    for name in JUDGES:
        logger.info("reward model %s", name)
        train_reward_model(name, work, tokenizer, asked, samples, int(NUM_REWARD_PAIRS * scale))
    logger.info("DPO")
    train_baseline(work, tokenizer, asked, samples)
    shutil.rmtree(output / "weights", ignore_errors=True)
    for name in MODELS:
        store(work / name, output / "weights" / name, tokenizer)
    world = {"beta": BETA, "prompts": prompts.evaluation, "demo_prompts": prompts.demo}
    (output / "world.json").write_text(json.dumps(world, indent=1) + "\n", encoding="utf-8")
    trained = time.monotonic()
    logger.info("measuring")
    scores = measure.measure_world(output / "weights", prompts.evaluation, seed=5)
    minutes = (trained - started) / 60
    card.write_card(output, scores, BETA, len(prompts.evaluation), minutes)
    logger.info("done in %.1f minutes", (time.monotonic() - started) / 60)


def main() -> None:
    """Parse the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the training data, for quick trials"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with tempfile.TemporaryDirectory() as work:
        train_world(Path(work), arguments.output, arguments.scale)


if __name__ == "__main__":
    main()
