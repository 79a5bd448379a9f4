"""Whole responses, or what is left of them, drawn over forests of shared prefixes.

Every prompt is a tree of the forest and every response a row of it, from its first token to its
last; all rows of all prompts go through one forward pass a token. Equal prompts that follow one
another, such as those of several responses, share a tree. Where texts that were drawn stay in their
trees, each prompt has one of its own: its text may be cut anywhere and continued from there, and
nothing of it but the token before the cut is encoded again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ..config import DecodeConfig, Role
from ..copies import download, upload
from ..errors import DecodingError
from ..forest.graphs import has_graphs
from ..forest.language import LanguageForest, StateForest
from ..forest.store import Lease
from ..forest.support import check_runs
from ..results import DecodeStats, Response
from ..rollouts.rows import RowMap
from ..rollouts.state import RolloutState
from ..rollouts.streams import stream_keys
from ..session import Session
from ..transfer.roles import distinct
from .depths import TextGraphs, beside, gather
from .laws import Output, TokenLaw, record_draw

_Kind = TypeVar("_Kind", LanguageForest, StateForest)
# Takes the place of the candidate in the key of a random stream; no token has this id.
NO_CANDIDATE = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One draw of tokens and the laws that they came from; T tokens, natural logs in fp32.

    Attributes:
        tree: number of the prompt that it belongs to.
        row: the row of the caches that holds the KV of all its tokens but the last.
        token_ids: its tokens, an EOS included.
        columns: `[T]` by name, as `laws` lists them.
    """

    tree: int
    row: int
    token_ids: list[int]
    columns: dict[str, torch.Tensor]


class TextForest:
    """The texts of some prompts, one a tree, over a forest for each model that draws them.

    Args:
        session: the models.
        law: what tokens are drawn from.
        responses: the prompts, whose tokens stay out of it.
        num_rows: draws that go on together, at most.
        config: max_new_tokens, min_new_tokens, stop and backend are read.
        keeps_texts: whether texts stay in their trees, and so need room there.

    Attributes:
        forests: by role, one where two roles have one model.
        states: the reward model's backbone, where the law reads its states.
    """

    def __init__(
        self,
        session: Session,
        law: TokenLaw,
        responses: Sequence[Response],
        *,
        num_rows: int,
        config: DecodeConfig,
        keeps_texts: bool,
    ) -> None:
        self.law = law
        self.config = config
        self.responses = responses
        self.stop = session.stop_strings(config)
        self.shares_prefixes = session.speed.share_prefixes
        self.uses_graphs = session.speed.graph_rollouts
        self.prompts = [list(response.prompt.token_ids) for response in responses]
        self.keeps_texts = keeps_texts
        # The tree of each prompt, ascending.
        self._tree_of = _place(self.prompts, shares=self.shares_prefixes and not keeps_texts)
        self._leases: list[Lease] = []
        self.forests = self._open(session, num_rows)
        self.states = self._open_states(session, num_rows)
        device = next(iter(self.forests.values())).device
        self.eos = torch.tensor(session.end_ids(config), dtype=torch.int64, device=device)
        self.graphs = self._open_graphs(session) if self._runs_graphs() else None

    def _open(self, session: Session, num_rows: int) -> dict[Role, LanguageForest]:
        languages = {role: session.languages[role] for role in self.law.roles}
        by_model: dict[PreTrainedModel, LanguageForest] = {}
        for model in distinct(languages).values():
            check_runs(model)
            reads = self.law.reads_hidden
            by_model[model] = self._take(
                session,
                LanguageForest,
                model,
                keeps_hidden=reads is not None and languages[reads] is model,
                cpu_layers=session.speed.cpu_layers,
                compiled_modules=session.speed.compiled_modules,
                **self._sizes(num_rows),
            )
        return {role: by_model[model] for role, model in languages.items()}

    def _open_states(self, session: Session, num_rows: int) -> StateForest | None:
        if not self.law.reads_reward:
            return None
        model: Any = session.rewards["reward"].model
        return self._take(
            session,
            StateForest,
            model,
            cpu_layers=session.speed.cpu_layers,
            compiled_modules=session.speed.compiled_modules,
            **self._sizes(num_rows),
        )

    def _take(self, session: Session, kind: type[_Kind], model: Any, **options: Any) -> _Kind:
        forest, lease = session.forests.open(kind, model, **options)
        self._leases.append(lease)
        return forest

    def _runs_graphs(self) -> bool:
        """Whether tokens are drawn in graphs: a stop string is looked for on the host."""
        devices = {forest.device for forest in self.all_forests}
        is_on_one = len(devices) == 1 and has_graphs(*devices)
        return self.uses_graphs and is_on_one and not self.stop

    def _open_graphs(self, session: Session) -> TextGraphs:
        forests, states, law, eos = self.forests, self.states, self.law, self.eos
        num_tokens, first = self.config.max_new_tokens, self.all_forests[0]
        others = tuple(map(id, self.all_forests))
        return session.forests.graphs_for(
            first,
            (law, session.end_ids(self.config), num_tokens, others),
            lambda: TextGraphs(forests, states, law, eos=eos, num_tokens=num_tokens),
        )

    def _sizes(self, num_rows: int) -> dict[str, Any]:
        longest, most = max(map(len, self.prompts)), self.config.max_new_tokens
        num_trees = self._tree_of[-1] + 1
        return {
            "num_trees": num_trees,
            "num_rows": max(num_rows, num_trees),
            "prefix_capacity": longest + (most if self.keeps_texts else 0),
            "branch_capacity": max(1, most - 1),
            "backend": self.config.backend,
            "graphs": self.uses_graphs,
        }

    @property
    def all_forests(self) -> list[LanguageForest | StateForest]:
        """Every forest once."""
        states = [] if self.states is None else [self.states]
        return [*distinct(self.forests).values(), *states]

    def prefill(self) -> None:
        """Encode the prompts; draws follow them directly until `seek` says otherwise."""
        of_trees = list(dict(zip(self._tree_of, self.prompts, strict=True)).values())
        for forest in self.all_forests:
            forest.encode(range(len(of_trees)), of_trees, shares=self.shares_prefixes)

    def seek(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Let the next draws of each tree follow `texts[tree]`, of which its KV is held."""
        assert self.keeps_texts, "prompts may share a tree"
        trees = sorted(texts)
        whole = [[*self.prompts[tree], *texts[tree]] for tree in trees]
        for forest in self.all_forests:
            forest.seek(trees, whole)

    def keep(self, drawn: Sequence[Drawn]) -> None:
        """Keep draws of the last call of `draw` behind the prefixes that they follow.

        The prefixes stay where they are, so that further draws can follow them.
        """
        assert self.keeps_texts, "prompts may share a tree"
        for forest in self.all_forests:
            cache = forest.cache
            held = list(cache.prefix_len)
            lengths = [len(one.token_ids) - 1 for one in drawn]
            cache.commit_rows([one.tree for one in drawn], [one.row for one in drawn], lengths)
            cache.prefix_len = held

    def draw(
        self,
        numbers: Sequence[int],
        *,
        stage: int,
        before: Mapping[int, Sequence[int]],
        limit: int | None = None,
        on_depth: Callable[[int], None] = lambda num: None,
    ) -> list[Drawn]:
        """Draw a continuation of each of `numbers` for every prompt of `before`.

        Args:
            numbers: of the draws of a prompt at this stage; each has a random stream of its own.
            stage: number of the stage, part of the key of the random streams.
            before: the response tokens that the draws of each prompt, by its number, follow.
            limit: tokens at most, beside the length that is left of the response.
            on_depth: called after every token of all draws, with their number.

        Returns:
            The draws by prompt, then number.

        Raises:
            DecodingError: logits that are no law; prompt_idx is the prompt's position in the call.
        """
        prompts = [prompt for prompt in sorted(before) for _ in numbers]
        state = self._begin(prompts, numbers, stage, before, limit)
        rows = RowMap(state)
        outputs = self._next_outputs(rows.tree)
        started = [before[prompt] for prompt in prompts]
        for depth in range(state.tokens.shape[1]):
            num = rows.num_active
            early = self._early(state, depth, started, num)
            draw = self.law.draw(outputs, state.keys[:num], depth, early)
            record_draw(draw, state, depth, eos=self.eos)
            self._stop(state, num, depth, started)
            on_depth(len(prompts))
            if self.graphs is not None:
                # Graphs take rows that ascend in their trees, and so as they began.
                is_last = depth + 1 == state.tokens.shape[1]
                if is_last or (
                    early is None and self._finish_in(self.graphs, state, depth + 1, on_depth)
                ):
                    break
            else:
                order = rows.compact()
                if not rows.num_active:
                    break
                if order is not None:
                    for forest in self.all_forests:
                        forest.cache.take_rows(order, depth)
            outputs = self._forward(rows.tokens(depth), depth, rows.tree)
        return self._collect(state, prompts, started)

    def _finish_in(
        self,
        graphs: TextGraphs,
        state: RolloutState,
        first: int,
        on_depth: Callable[[int], None],
    ) -> bool:
        """Leave all tokens after the `first` to `graphs`; False where a model is not captured."""
        num = len(state.keys)
        num_depths = state.tokens.shape[1]
        if graphs.run(state, num_depths, first=first, on_depth=lambda: on_depth(num)) is None:
            self.graphs = None
            return False
        return True

    def _stop(
        self, state: RolloutState, num: int, depth: int, started: Sequence[Sequence[int]]
    ) -> None:
        """Finish those of the first `num` draws that end with a stop string."""
        if not self.stop:
            return
        origins, drawn = state.origin[:num].tolist(), state.tokens[:num, : depth + 1].tolist()
        is_met = [
            self.stop.is_met([*started[origin], *tokens])
            for origin, tokens in zip(origins, drawn, strict=True)
        ]
        state.finished[:num] |= torch.tensor(is_met, device=state.finished.device)

    def _next_outputs(self, tree: torch.Tensor) -> dict[Role, Output]:
        """What the models give after the prefixes of `tree` `[n]`."""
        states = None if self.states is None else self.states.next_hidden[tree]
        outputs = {}
        for role, forest in self.forests.items():
            hidden = None if forest.next_hidden is None else forest.next_hidden[tree]
            outputs[role] = Output(forest.next_logits[tree], beside(hidden, states))
        return outputs

    def _forward(self, tokens: torch.Tensor, depth: int, tree: torch.Tensor) -> dict[Role, Output]:
        """Push one token a row through the models, and return what they give."""
        states = None
        if self.states is not None:
            states = self.states.forward_rows(tokens[:, None], start=depth, tree=tree)[:, -1]
        logits = {
            forest: forest.forward_rows(tokens, start=depth, tree=tree)
            for forest in distinct(self.forests).values()
        }
        return gather(self.forests, logits, states)

    def _begin(
        self,
        prompts: Sequence[int],
        numbers: Sequence[int],
        stage: int,
        before: Mapping[int, Sequence[int]],
        limit: int | None,
    ) -> RolloutState:
        keys = stream_keys(
            [
                (self.responses[prompt].prompt.key, stage, NO_CANDIDATE, number)
                for prompt, number in zip(prompts, itertools.cycle(numbers), strict=False)
            ]
        )
        most = self.config.max_new_tokens
        limits = [most - len(before[prompt]) for prompt in prompts]
        if limit is not None:
            limits = [min(limit, left) for left in limits]
        trees = [self._tree_of[prompt] for prompt in prompts]
        there = upload(self.eos.device, keys, torch.tensor(limits), torch.tensor(trees))
        return RolloutState.begin(*there, num_tokens=max(limits), columns=self.law.columns)

    def _early(
        self, state: RolloutState, depth: int, started: Sequence[Sequence[int]], num: int
    ) -> list[bool] | None:
        """Which of the first rows may draw no EOS yet; None where all may."""
        least = self.config.min_new_tokens
        if not least:
            return None
        early = [len(started[origin]) + depth < least for origin in state.origin[:num].tolist()]
        return early if any(early) else None

    def _collect(
        self,
        state: RolloutState,
        prompts: Sequence[int],
        started: Sequence[Sequence[int]],
    ) -> list[Drawn]:
        """Return what came of every draw, in the order in which they began."""
        fields = (state.origin, state.lengths, state.tokens, *state.columns.values())
        origin, *ended = download(*fields)
        places = origin.argsort()
        lengths, tokens, *values = (field[places] for field in ended)
        columns = dict(zip(state.columns, values, strict=True))
        drawn = [
            Drawn(
                prompts[i],
                row,
                of_row[:length],
                {name: column[i, :length] for name, column in columns.items()},
            )
            for i, (row, length, of_row) in enumerate(
                zip(*(field.tolist() for field in (places, lengths, tokens)), strict=True)
            )
        ]
        for one, before in zip(drawn, started, strict=True):
            broken = (one.columns["policy"] == -torch.inf).nonzero()
            if len(broken):
                step = int(broken[0]) + len(before)
                idx = self.responses[one.tree].idx
                raise DecodingError("the logits are not finite", prompt_idx=idx, step=step)
        return drawn

    def count(self, stats: DecodeStats) -> None:
        """Write what went through the models into `stats`."""
        own = DecodeStats()
        for role, forest in distinct(self.forests).items():
            own.token_forwards[role] = forest.num_token_forwards
            own.peak_kv_bytes[role] = forest.peak_kv_bytes
        if self.states is not None:
            own.token_forwards["reward_states"] = self.states.num_token_forwards
            own.peak_kv_bytes["reward_states"] = self.states.peak_kv_bytes
        stats.add(own)


def _place(prompts: Sequence[Sequence[int]], *, shares: bool) -> list[int]:
    """Return the tree of each prompt: equal neighbours have one, if they may share it."""
    trees = [0]
    for before, prompt in itertools.pairwise(prompts):
        trees.append(trees[-1] if shares and prompt == before else trees[-1] + 1)
    return trees
