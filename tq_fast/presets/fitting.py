"""`fit_value`: a value head from prompts, a prior and a reward (Transfer Q*, amortised)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from transformers import PreTrainedModel

from ..config import DecodeConfig, Role, require_int, require_positive
from ..engines.local import without_tokens
from ..errors import InvalidArgument
from ..forest.language import LanguageForest, StateForest, vocab_size_of
from ..forest.support import check_runs
from ..models.loading import ModelLike
from ..models.served import require_local
from ..ops.sample_tokens import proposal_logprobs
from ..ops.topk_logprobs import clean_logits
from ..prompts import Prompt
from ..session import Session, neutral_torch
from ..session.method import MethodOptions
from ..values.fitting import FitOptions, LoggedTokens, fit_head
from ..values.head import ValueHead, ValueHeadConfig
from .call import RUNNING, OpenMethod, PresetCall, check_running
from .laws import ValueLaw
from .plain import PlainMethod
from .sources import TextSource, check_reward_states, prior_fingerprint, value_prior

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from . import Prompts, RewardLike

# Logits that one pass over logged texts may hold, in bytes.
_LOGITS_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class LoggedTexts:
    """Whole texts that were drawn after a prompt, and their rewards.

    Attributes:
        prompt: the prompt, as the session's tokenizer reads it.
        sequences: token ids of each text, an EOS included.
        rewards: one a text.
        drawn_from: 0 for texts of the source, 1 for those of the first head, and so on.
    """

    prompt: Prompt
    sequences: Sequence[Sequence[int]]
    rewards: Sequence[float]
    drawn_from: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitPlan:
    """What is fitted from logged texts.

    Attributes:
        transfer: "direct": the Q of the law that drew the texts; "indirect": the Q of the law
            aligned to the reward, by the weights exp(r / beta) rho_sft / rho_BL of what follows a
            token.
        beta: KL weight that the baseline was trained with, for "indirect".
        rounds: 1, or more: further rounds draw as many texts again from the prior under the head of
            the round before, and fit a new one on all of them.
        alpha: decoding temperature of those rounds.
        num_texts: texts a prompt and round.
        reward_states: whether the head reads the reward model's states beside the prior's.
        options: how a head is fitted.

    Raises:
        InvalidArgument: a value is wrong.
    """

    transfer: Literal["direct", "indirect"] = "direct"
    beta: float | None = None
    rounds: int = 1
    alpha: float = 0.5
    num_texts: int = 8
    reward_states: bool = False
    options: FitOptions = dataclasses.field(default_factory=FitOptions)

    def __post_init__(self) -> None:
        require_int("rounds", self.rounds)
        require_int("num_texts", self.num_texts)
        require_int("epochs", self.options.epochs)
        if self.transfer not in ("direct", "indirect"):
            raise InvalidArgument(
                f"transfer must be one of 'direct', 'indirect', got {self.transfer!r}"
            )
        require_positive("alpha", self.alpha)
        if self.beta is not None:
            require_positive("beta", self.beta)
        is_needed = self.transfer == "indirect"
        if is_needed and self.beta is None:
            raise InvalidArgument(
                "beta must be given for transfer='indirect': the KL weight that the baseline was "
                "trained with, got None"
            )
        if is_needed and self.num_texts < 2:
            raise InvalidArgument(
                "num_texts must be at least 2 for transfer='indirect', whose weights compare the "
                f"texts of a prompt, got {self.num_texts}"
            )


def fit_value(  # type: ignore[misc]  # it has defaults of its own for some fields
    prompts: Prompts,
    *,
    reward: RewardLike,
    sft: ModelLike | None = None,
    baseline: ModelLike | None = None,
    source: Role = "sft",
    num_texts: int = 8,
    max_new_tokens: int = 128,
    seed: int = 0,
    transfer: Literal["direct", "indirect"] = "direct",
    beta: float | None = None,
    rounds: int = 1,
    alpha: float = 0.5,
    epochs: int = 6,
    reward_states: bool = False,
    on_epoch: Callable[[int, float], None] = lambda epoch, r2: None,
    **options: Unpack[MethodOptions],
) -> ValueHead:
    """Fit the value head that `presets.value_guided` and `source="value"` decode with.

    Draws `num_texts` responses to each prompt, scores them by `reward`, and fits
    `Q_V(x, z) = v(f(h)) + u(f(h)) . e_z` to the reward of the whole text at every token, by least
    squares; h is the state of the prior: what the option `prior` says, else `sft` where that is
    given and `baseline` where it is not. Some of the prompts are held out: `head.config.fit` says
    how well the head foretells their rewards.

    Args:
        prompts: as for `tq_fast.decode`; other ones than those that are decoded later.
        reward: the target reward, as for `tq_fast.decode`.
        sft: the prior that the head will guide.
        baseline: the aligned model, for `source="baseline"`.
        source: the model that draws the texts: "baseline" gives the direct Q of Transfer Q*, "sft"
            that of controlled decoding.
        num_texts: texts a prompt and round.
        max_new_tokens: length of a text, at most.
        seed: of every random draw.
        transfer: "indirect" weighs the texts of a baseline that was aligned to another reward.
        beta: KL weight of that alignment.
        rounds: 2 adds texts drawn under the first head (arXiv 2503.02368).
        alpha: decoding temperature of the second round.
        epochs: passes over all tokens.
        reward_states: the head reads the reward model's states over the same tokens, too: dearer by
            one forward pass of the reward a token, and closer to the reward at equal divergence.
        on_epoch: called after each epoch with its number and the held-out R2.
        **options: other keyword arguments of `presets.best_of_n`.

    Returns:
        The head; `head.save(folder)` keeps it.

    Raises:
        InvalidArgument: an argument is wrong, or there is nothing to fit.
    """
    if source not in ("sft", "baseline"):
        raise InvalidArgument(f"source must be one of 'sft', 'baseline', got {source!r}")
    plan = FitPlan(
        transfer=transfer,
        beta=beta,
        rounds=rounds,
        alpha=alpha,
        num_texts=num_texts,
        reward_states=reward_states,
        options=FitOptions(epochs=epochs, seed=seed),
    )
    running: dict[str, Any] = {name: options.pop(name) for name in RUNNING if name in options}
    check_running(running)
    models = {"sft": sft, "baseline": baseline, "reward": reward}
    given = {**options, "max_new_tokens": max_new_tokens, "seed": seed}
    opened = open_logging("fit_value", models, given, num_texts=num_texts, source=source)
    check_plan(opened.session, plan)
    template_options = running.pop("template_options", None)
    read = opened.session.read(prompts, template_options)
    result = opened.decode(read, **running)
    texts = [
        LoggedTexts(prompt, stages[0].sequences or [], stages[0].rewards.tolist())
        for prompt, stages in zip(read, result.stages, strict=True)
    ]
    return fit_from_texts(opened, texts, plan, on_epoch=on_epoch, **running)


def open_logging(
    name: str, models: dict[str, Any], options: dict[str, Any], *, num_texts: int, source: Role
) -> OpenMethod:
    """Open the drawing of texts for a fit: the best of n whose models are all loaded.

    Args:
        name: what messages call the method.
        models: by role; both language models where they are given.
        options: other keyword arguments of best_of_n.
        num_texts: texts a prompt.
        source: the role whose model draws them.
    """
    require_int("num_texts", num_texts)
    call = PresetCall("best_of_n", options, models)
    call.method = name
    call.require(source, "reward")
    if call.config.num_return_sequences != 1:
        raise InvalidArgument(
            f"num_return_sequences is 1 for {name!r}, which draws num_texts responses to each "
            f"prompt, got {call.config.num_return_sequences}"
        )

    def make(session: Session, config: DecodeConfig) -> PlainMethod:
        law = TextSource(name, source).law(session, config, is_greedy=False, measures_sft=False)
        return PlainMethod(session, law, config, num=num_texts, keeps_all=True)

    return call.open(make)


def check_plan(session: Session, plan: FitPlan) -> None:
    """Refuse a plan that the session's models cannot serve.

    Raises:
        InvalidArgument: indirect transfer without both language models, or states of a reward that
            has none over the same tokens.
    """
    require_local(session.languages, "fit_value", "a value head reads a model's states")
    if plan.transfer == "indirect" and len(session.languages) < 2:
        raise InvalidArgument("transfer='indirect' needs sft and baseline, one of them is None")
    if plan.reward_states:
        check_reward_states(session)


@neutral_torch()
@torch.no_grad()
def fit_from_texts(
    opened: OpenMethod,
    texts: Sequence[LoggedTexts],
    plan: FitPlan,
    *,
    on_epoch: Callable[[int, float], None] = lambda epoch, r2: None,
    **running: Any,
) -> ValueHead:
    """Fit a head to texts that are drawn and scored already, in rounds where the plan has several.

    Args:
        opened: what `open_logging` returned.
        texts: of each prompt.
        plan: what is fitted.
        on_epoch: called after each epoch with its number and the held-out R2.
        **running: the keyword arguments of `Session.run`, for further rounds.
    """
    session, config = opened.session, opened.config
    check_plan(session, plan)
    known, laws = list(texts), [opened.method.law]  # type: ignore[attr-defined]
    prompts = [entry.prompt for entry in texts]
    prior = value_prior(session, config)
    reader = _TokenReader(session, prior, config, plan)
    tokens = reader.read(known, laws)
    head = _fit(session, prior, tokens, plan, on_epoch, len(known))
    for number in range(1, plan.rounds):
        guided = dataclasses.replace(config, alpha=plan.alpha, seed=config.seed + number)
        law = TextSource(opened.name, "value", head).law(
            session, guided, is_greedy=False, measures_sft=False
        )
        method = PlainMethod(session, law, guided, num=plan.num_texts, keeps_all=True)
        result = session.run(prompts, method, **running)
        laws.append(law)
        known += [
            LoggedTexts(prompt, stages[0].sequences or [], stages[0].rewards.tolist(), number)
            for prompt, stages in zip(prompts, result.stages, strict=True)
        ]
        tokens = reader.read(known, laws)
        head = _fit(session, prior, tokens, plan, on_epoch, len(prompts))
    return head


def _fit(
    session: Session,
    prior: Role,
    tokens: LoggedTokens,
    plan: FitPlan,
    on_epoch: Callable[[int, float], None],
    num_prompts: int,
) -> ValueHead:
    model = cast(PreTrainedModel, session.languages[prior])
    reward = session.rewards["reward"]
    foretold = reward.name
    if plan.reward_states:
        foretold = prior_fingerprint(cast(PreTrainedModel, reward.model))
    described: dict[str, Any] = {"transfer": plan.transfer, "rounds": plan.rounds, "prior": prior}
    if plan.transfer == "indirect":
        described["beta"] = plan.beta
    config = ValueHeadConfig(
        hidden_size=tokens.hidden.shape[1],
        vocab_size=vocab_size_of(model),
        reward_states=plan.reward_states,
        models={"prior": prior_fingerprint(model), "reward": foretold},
        fit=described,
    )
    return fit_head(tokens, config, plan.options, on_epoch)


class _TokenReader:
    """Reads the states before every token of logged texts off the prior."""

    def __init__(self, session: Session, prior: Role, config: DecodeConfig, plan: FitPlan) -> None:
        self.session = session
        self.prior = prior
        self.config = config
        self.plan = plan
        self._done: list[LoggedTokens] = []
        # One group for all texts of a prompt, of whatever round, since whole groups are held out.
        self._groups: dict[tuple[int, ...], int] = {}

    def read(self, texts: Sequence[LoggedTexts], laws: Sequence[Any]) -> LoggedTokens:
        """Return the tokens of all `texts`; those that were read before are not read again."""
        for entry in texts[len(self._done) :]:
            prompt = tuple(entry.prompt.token_ids)
            group = self._groups.setdefault(prompt, len(self._groups))
            self._done.append(self._read_one(entry, group, laws))
        parts = [part for part in self._done if len(part.token_ids)]
        if not parts:
            raise InvalidArgument("prompts must have at least one text of one token, got none")
        fields = {
            field.name: torch.cat([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(LoggedTokens)
            if getattr(parts[0], field.name) is not None
        }
        return LoggedTokens(**fields)

    def _read_one(self, entry: LoggedTexts, group: int, laws: Sequence[Any]) -> LoggedTokens:
        rows = [list(ids) for ids in entry.sequences]
        rewards = torch.tensor(list(entry.rewards), dtype=torch.float32)
        lengths = torch.tensor([len(row) for row in rows])
        needs = self.plan.transfer == "indirect"
        law = laws[entry.drawn_from]
        own = list(self._run_reward(entry.prompt, rows)) if self.plan.reward_states else None
        hidden: list[torch.Tensor] = []
        # Log-probs of each text's tokens: under SFT, and under the law that drew them.
        sft, drawn = [torch.empty(0)] * len(rows), [torch.empty(0)] * len(rows)
        for role in {self.prior, *(("sft", law.roles[0]) if needs else ())}:
            for i, (states, logits) in enumerate(self._run(role, entry.prompt, rows)):
                if own is not None:
                    states = torch.cat([states.float(), own[i].float()], 1)
                if role == self.prior:
                    hidden.append(states)
                if logits is not None and role == "sft":
                    sft[i] = self._sft_logprobs(logits, rows[i])
                if logits is not None and role == law.roles[0]:
                    drawn[i] = self._drawn_logprobs(law, logits, states, rows[i])
        token_ids = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
        weights = torch.ones(len(token_ids))
        if needs:
            weights = self._weights(rewards, [a - b for a, b in zip(sft, drawn, strict=True)])
        return LoggedTokens(
            hidden=torch.cat(hidden),
            token_ids=token_ids,
            rewards=rewards.repeat_interleave(lengths),
            groups=torch.full((len(token_ids),), group, dtype=torch.int64),
            weights=weights,
        )

    def _run(
        self, role: Role, prompt: Prompt, rows: list[list[int]]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yield states `[T, D]`, and logits `[T, V]` where weights need them, of each row.

        They are those before its tokens.
        """
        model = self.session.languages[role]
        check_runs(model)
        longest = max(map(len, rows))
        per_pass = max(1, _LOGITS_BYTES // (4 * vocab_size_of(model) * longest))
        forest = LanguageForest(
            model,
            num_trees=1,
            num_rows=min(per_pass, len(rows)),
            prefix_capacity=len(prompt.token_ids),
            branch_capacity=longest,
            backend=self.config.backend,
            keeps_hidden=True,
        )
        forest.prefill(0, prompt.token_ids)
        assert forest.next_hidden is not None
        first_state, first_logits = forest.next_hidden.clone(), forest.next_logits.clone()
        for start in range(0, len(rows), per_pass):
            chunk = rows[start : start + per_pass]
            width = max(map(len, chunk)) - 1
            states, found = None, None
            if width:
                padded = [[*row[:-1], *[0] * (width - len(row) + 1)] for row in chunk]
                tree = torch.zeros(len(chunk), dtype=torch.int64, device=forest.device)
                ids = torch.tensor(padded, device=forest.device)
                output = forest.run_branches(forest.model, ids, start=0, tree=tree)
                states, found = forest.hidden, output.logits
            for i, row in enumerate(chunk):
                hidden = first_state if states is None else torch.cat([first_state, states[i]])
                logits = None
                if self.plan.transfer == "indirect":
                    logits = first_logits if found is None else torch.cat([first_logits, found[i]])
                    logits = logits[: len(row)].cpu()
                yield hidden[: len(row)].cpu(), logits

    def _run_reward(self, prompt: Prompt, rows: list[list[int]]) -> Iterator[torch.Tensor]:
        """Yield the reward model's states `[T, D]` before the tokens of each row."""
        model = cast(PreTrainedModel, self.session.rewards["reward"].model)
        longest = max(map(len, rows))
        forest = StateForest(
            model,
            num_trees=1,
            num_rows=len(rows),
            prefix_capacity=len(prompt.token_ids),
            branch_capacity=longest,
            backend=self.config.backend,
        )
        forest.prefill(0, prompt.token_ids)
        first, states = forest.next_hidden.clone(), None
        if longest > 1:
            padded = [[*row[:-1], *[0] * (longest - len(row))] for row in rows]
            tree = torch.zeros(len(rows), dtype=torch.int64, device=forest.device)
            ids = torch.tensor(padded, device=forest.device)
            states = forest.forward_rows(ids, start=0, tree=tree)
        for i, row in enumerate(rows):
            hidden = first if states is None else torch.cat([first, states[i]])
            yield hidden[: len(row)].cpu()

    def _sft_logprobs(self, logits: torch.Tensor, row: list[int]) -> torch.Tensor:
        """log pi_sft of every token of a text, fp64 `[T]`."""
        law = clean_logits(logits, self.session.num_tokens).log_softmax(-1)
        return law.gather(1, torch.tensor(row)[:, None]).squeeze(1).double()

    def _drawn_logprobs(
        self, law: Any, logits: torch.Tensor, states: torch.Tensor, row: list[int]
    ) -> torch.Tensor:
        """Log density that every token of a text was drawn from, fp64 `[T]`."""
        config, size = self.config, self.session.num_tokens
        policy = clean_logits(logits, size)
        early = [place < config.min_new_tokens for place in range(len(row))]
        if any(early):
            policy = without_tokens(policy, self.session.end_ids(config), early)
        if isinstance(law, ValueLaw):
            _, directions = law.head(states)
            vectors = law.head.token_embeddings[:size].float()
            policy = policy + directions @ vectors.t() / law.config.alpha
        drawn = proposal_logprobs(
            policy,
            temperature=config.rollout_temperature,
            top_k=config.rollout_top_k,
            top_p=config.rollout_top_p,
        )
        return drawn.gather(1, torch.tensor(row)[:, None]).squeeze(1).double()

    def _weights(self, rewards: torch.Tensor, ratios: Sequence[torch.Tensor]) -> torch.Tensor:
        """exp(r / beta) rho_sft / q of what follows each token, `[N]`, q being drawn from.

        Their mean is 1 over the texts at each place: a factor that depends on the text before a
        token alone moves no minimum, and without it few places would be all that counts.

        Args:
            rewards: of each text.
            ratios: log pi_sft - log q of every token of each text, fp64 `[T]`.
        """
        assert self.plan.beta is not None
        table = torch.full((len(ratios), max(map(len, ratios))), -torch.inf, dtype=torch.float64)
        for i, ratio in enumerate(ratios):
            # What follows a token: the sum over all, less that up to and with itself.
            after = ratio.sum() - ratio.cumsum(0)
            table[i, : len(ratio)] = rewards[i].double() / self.plan.beta + after
        used = table > -torch.inf
        table = table.softmax(0) * used.sum(0)
        return table[used].float()
