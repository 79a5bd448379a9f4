"""The embedded world: a trio of tiny models over a synthetic language, and the truth about it.

The models are ordinary ``transformers`` folders; load them by path as any other model. How they
were made and what they score is in ``README.md`` beside this file.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

from .gold import (
    all_of_4,
    all_of_5,
    baseline_gold_reward,
    conditions_4,
    conditions_5,
    distinct_sentences,
    gold_reward,
)
from .grammar import LOCATIONS, PLACES, PROMPTS

__all__ = [
    "TinyWorld",
    "all_of_4",
    "all_of_5",
    "baseline_gold_reward",
    "conditions_4",
    "conditions_5",
    "distinct_sentences",
    "gold_reward",
    "load_tiny_world",
    "other_prompts",
]

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class TinyWorld:
    """The folders of the embedded models, and prompts to ask them.

    ``beta`` is the KL weight that the baseline was trained with (rho_BL is proportional to
    rho_sft exp(r_BL / beta)). No model was trained on these prompts.
    """

    sft: Path
    baseline: Path
    reward: Path
    baseline_reward: Path
    beta: float
    prompts: tuple[str, ...]
    demo_prompts: tuple[str, ...]


def load_tiny_world() -> TinyWorld:
    """Return the folders of the embedded models and the held-out prompts; loads no model.

    Raises:
        FileNotFoundError: the package was installed without its data files.
    """
    weights = _FOLDER / "weights"
    folders = {name: weights / name for name in ("sft", "baseline", "reward", "baseline_reward")}
    for folder in folders.values():
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(
                f"the embedded model {folder} is missing: reinstall the package, or train it again "
                "with scripts/train_tiny_models.py"
            )
    world = json.loads((_FOLDER / "world.json").read_text(encoding="utf-8"))
    return TinyWorld(
        **folders,
        beta=world["beta"],
        prompts=tuple(world["prompts"]),
        demo_prompts=tuple(world["demo_prompts"]),
    )


def other_prompts(num: int, seed: int = 0) -> list[str]:
    """Return `num` prompts of the same kind that are neither held out nor shown in the demo.

    Raises:
        ValueError: there are not so many.
    """
    world = load_tiny_world()
    known = {*world.prompts, *world.demo_prompts}
    prompts = [
        form.format(place=place, location=location, x=x, y=y)
        for form in PROMPTS
        for place, aspects in PLACES.items()
        for location in LOCATIONS
        for x, y in itertools.permutations(aspects, 2)
    ]
    others = [prompt for prompt in prompts if prompt not in known]
    random.Random(seed).shuffle(others)
    if num > len(others):
        raise ValueError(f"there are {len(others)} other prompts, {num} are asked for")
    return others[:num]
