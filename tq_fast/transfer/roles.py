"""The models of one decode by role, each over its own forest, and the plan of the decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

from transformers import PreTrainedModel

from ..config import DecodeConfig, Role, SpeedOptions
from ..engines.base import LanguageEngine
from ..engines.local import ForestEngine
from ..engines.remote import ServerEngine
from ..forest.language import LanguageForest
from ..forest.store import ForestStore
from ..forest.support import check_runs
from ..models.served import LanguageModel, ServedModel
from ..prompts import Prompt
from ..rewards.base import Opening, Reward
from ..rewards.scorer import Scorer
from ..rollouts.stopping import StopStrings
from ..servers import LanguageServer
from .budget import MemoryPerPrompt


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """The settings of one decode, the same from its first step to its last.

    Attributes:
        config: how to decode.
        roller: the role whose model rolls out.
        prior: the role whose policy is reweighted.
        candidates_from: the role whose policy proposes the candidates.
        eos: ids that end a response.
        stop: strings that end it.
        vocab_size: number of ids that candidates' log-probs are normalised over.
        num_tokens: ids from here on have no token and are never chosen.
        reward_bounds: (lo, hi) of the reward, where declared.
        max_rows: most roll-outs that run together.
        speed: the speed options.
    """

    config: DecodeConfig
    roller: Role
    prior: Role
    candidates_from: Role
    eos: tuple[int, ...]
    stop: StopStrings
    vocab_size: int
    num_tokens: int
    reward_bounds: tuple[float, float] | None
    max_rows: int
    speed: SpeedOptions

    @property
    def is_lazy(self) -> bool:
        """Whether roll-outs are run only until the choice is settled."""
        is_bounded = self.reward_bounds is not None
        return self.speed.lazy_argmax and is_bounded and not self.config.is_published

    def is_complete(self, token_ids: Sequence[int]) -> bool:
        """Return whether a response of these tokens has come to its end."""
        is_full = len(token_ids) == self.config.max_new_tokens
        is_ended = bool(token_ids) and token_ids[-1] in self.eos
        return is_full or is_ended or self.stop.is_met(token_ids)


@dataclasses.dataclass(frozen=True)
class Roles:
    """The models of one decode, each over a forest with one tree a prompt.

    Attributes:
        languages: language models by role, "baseline" before "sft"; one engine stands under both
            where they are the same model.
        roller: the language model that rolls out.
        rewards: rewards that take part by role, "reward" before "baseline_reward"; one scorer
            stands under both where they are the same reward.
    """

    languages: Mapping[Role, LanguageEngine]
    roller: LanguageEngine
    rewards: Mapping[str, Scorer]

    @property
    def engines(self) -> dict[Role, LanguageEngine]:
        """Every engine once, under the first of its roles: "baseline" where it plays both."""
        return distinct(self.languages)

    @property
    def scorers(self) -> dict[str, Scorer]:
        """Every scorer once, under the first of its roles: "reward" where it plays both."""
        return distinct(self.rewards)

    @property
    def by_role(self) -> dict[str, LanguageEngine | Scorer]:
        """The engines and the reward scorers that take part, each once, by role."""
        parts: dict[str, LanguageEngine | Scorer] = dict(self.scorers)
        return {**{str(role): engine for role, engine in self.engines.items()}, **parts}


_Name = TypeVar("_Name", bound=str)
_Part = TypeVar("_Part")


def distinct(parts: Mapping[_Name, _Part]) -> dict[_Name, _Part]:
    """Return every part once, under the first role that it has."""
    seen: dict[int, _Name] = {}
    return {role: part for role, part in parts.items() if seen.setdefault(id(part), role) == role}


def open_roles(
    languages: Mapping[Role, PreTrainedModel | LanguageServer],
    rewards: Mapping[str, Reward],
    prompts: Sequence[Prompt],
    waiting: Sequence[Prompt],
    plan: DecodePlan,
    forests: ForestStore,
) -> Roles:
    """Open a forest for each model, with a tree for each of `prompts`.

    Args:
        languages: language models by role; of a model behind a URL, the server that is open for
            these settings.
        rewards: rewards by role.
        prompts: the prompts decoded first.
        waiting: prompts that take the places of those that are finished.
        plan: the settings of the decode.
        forests: where forests come from.
    """
    config, num_trees = plan.config, len(prompts)
    num_rows = max(num_trees, min(plan.max_rows, num_trees * rows_per_prompt(config)))
    branch = _branch_capacity(config)
    opening = Opening(
        prompts,
        num_rows=num_rows,
        max_new=config.max_new_tokens + branch,
        backend=config.backend,
        waiting=waiting,
        graphs=plan.speed.graph_rollouts,
        forests=forests,
        compiled_modules=plan.speed.compiled_modules,
    )
    scoring = _scoring(rewards, config)
    by_reward = {
        id(reward): Scorer(
            reward.open(opening),
            num_trees,
            bounds=plan.reward_bounds if role == "reward" else None,
            remembers=plan.speed.score_once,
            stop=plan.stop,
        )
        for role, reward in distinct(scoring).items()
    }
    scorers = {role: by_reward[id(reward)] for role, reward in scoring.items()}
    sizes = _Sizes(num_trees, num_rows, _prefix_capacity([*prompts, *waiting], config), branch)
    by_model = {
        id(model): _open_engine(model, languages, plan, sizes, forests)
        for model in distinct(languages).values()
    }
    engines = {role: by_model[id(model)] for role, model in languages.items()}
    return Roles(engines, engines[plan.roller], scorers)


class _Sizes(NamedTuple):
    """Those of a forest that rolls out."""

    num_trees: int
    num_rows: int
    prefix: int
    branch: int


def _open_engine(
    model: PreTrainedModel | LanguageServer,
    languages: Mapping[Role, PreTrainedModel | LanguageServer],
    plan: DecodePlan,
    sizes: _Sizes,
    forests: ForestStore,
) -> LanguageEngine:
    """Open the engine of one of `languages`."""
    config = plan.config
    is_roller = model is languages[plan.roller]
    if isinstance(model, LanguageServer):
        return ServerEngine(
            model,
            sizes.num_trees,
            config=config,
            eos=plan.eos,
            scores_own=config.needs_log_ratio and model is languages["sft"],
        )
    check_runs(model)
    has_branches = is_roller or config.needs_log_ratio
    forest, lease = forests.open(
        LanguageForest,
        model,
        num_trees=sizes.num_trees,
        num_rows=sizes.num_rows if has_branches else sizes.num_trees,
        prefix_capacity=sizes.prefix,
        branch_capacity=sizes.branch if has_branches else 1,
        backend=config.backend,
        cpu_layers=plan.speed.cpu_layers,
        graphs=plan.speed.graph_rollouts,
        compiled_modules=plan.speed.compiled_modules,
    )
    return ForestEngine(
        forest,
        config=config,
        eos=plan.eos,
        vocab_size=plan.vocab_size,
        num_tokens=plan.num_tokens,
        merges=plan.speed.merge_equal,
        graphs=plan.speed.graph_rollouts and is_roller,
        forests=forests,
        lease=lease,
    )


def memory_per_prompt(
    languages: Mapping[Role, LanguageModel],
    rewards: Mapping[str, Reward],
    prompts: Sequence[Prompt],
    plan: DecodePlan,
) -> MemoryPerPrompt:
    """Return the bytes of a prompt and of a roll-out, for the longest of `prompts`.

    A model behind a URL takes none of this process.
    """
    config = plan.config
    prefix, branch = _prefix_capacity(prompts, config), _branch_capacity(config)
    per_prompt, per_row = 0, 2 * 4 * plan.vocab_size
    for model in distinct(languages).values():
        if isinstance(model, ServedModel):
            continue
        per_token = check_runs(model)
        if model is languages[plan.roller]:
            per_prompt += per_token * prefix
            per_row += per_token * (branch + 1)
        else:
            per_prompt += per_token * (prefix + 1)
            per_row += per_token * branch if config.needs_log_ratio else 0
    for reward in distinct(_scoring(rewards, config)).values():
        per_token = reward.kv_bytes_per_token()
        per_prompt += per_token * (prefix + branch)
        per_row += per_token * (branch + 2)
    return MemoryPerPrompt(per_prompt, per_row, rows_per_prompt(config))


def rows_per_prompt(config: DecodeConfig) -> int:
    """Return the number of roll-outs of one prompt."""
    return config.k * config.rollouts_per_candidate


def _scoring(rewards: Mapping[str, Reward], config: DecodeConfig) -> dict[str, Reward]:
    """Return the rewards that a decode computes, by role."""
    needs_both = config.needs_baseline_reward
    return {role: reward for role, reward in rewards.items() if role == "reward" or needs_both}


def _prefix_capacity(prompts: Sequence[Prompt], config: DecodeConfig) -> int:
    return max(len(prompt.token_ids) for prompt in prompts) + config.max_new_tokens


def _branch_capacity(config: DecodeConfig) -> int:
    return max(1, config.max_new_tokens if config.horizon is None else config.horizon)
