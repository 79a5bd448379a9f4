"""The loop of Transfer Q* (arXiv 2405.20495, Algorithm 1) over one forest."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from ..results import DecodeStats, Response
from ..rewards.base import drop_from
from ..rollouts.records import ReusedRollout
from .roles import DecodePlan, Roles
from .step import Step


class DecodeLoop:
    """The decode loop over one forest, whose steps append a token to the response in every slot.

    A prompt whose response is complete makes room for the next one that waits.

    Args:
        roles: the models, with one tree for each of `responses`.
        responses: the ones decoded first, each in a slot of its own; one that has tokens already
            is continued.
        waiting: responses that take the slots which become free.
        plan: the settings of the decode.
        stats: where counts are added.
    """

    def __init__(
        self,
        roles: Roles,
        responses: Sequence[Response],
        waiting: Sequence[Response],
        plan: DecodePlan,
        *,
        stats: DecodeStats,
    ) -> None:
        self.roles = roles
        self.active = list(responses)
        self.waiting = deque(waiting)
        self.plan = plan
        self.stats = stats
        self.reused: list[ReusedRollout | None] = [None] * len(responses)

    def tokens(self) -> Iterator[tuple[Response, bool]]:
        """Decode every response to its end; yield it after each token, and whether it is complete.

        All responses get their next token at once, and are yielded one after the other.
        """
        self._prefill(range(len(self.active)))
        while self.active:
            appended = self._step()
            yield from appended
            # Refill slots only after the caller has seen every response, so that an out-of-memory
            # error here loses none.
            for tree in reversed(range(len(appended))):
                if appended[tree][1]:
                    self._replace(tree)

    def _prefill(self, trees: Sequence[int]) -> None:
        """Encode the prompts of `trees`, whose prefixes are empty."""
        texts = [[*r.prompt.token_ids, *r.token_ids] for r in self.active]
        with self.stats.phase("prefill"):
            for engine in self.roles.engines.values():
                engine.encode(trees, texts, shares=self.plan.speed.share_prefixes)

    def _step(self) -> list[tuple[Response, bool]]:
        """Append a token to every response; return each with whether it is now complete."""
        step = Step(self.roles, self.active, self.reused, self.plan, self.stats)
        traces = step.run()
        with self.stats.phase("commit"):
            is_finished = [
                self.plan.is_complete([*response.token_ids, trace.token_id])
                for response, trace in zip(self.active, traces, strict=True)
            ]
            self.reused = [step.reused_after(tree, t.choice) for tree, t in enumerate(traces)]
            staying = [tree for tree, ended in enumerate(is_finished) if not ended]
            step.commit([(tree, traces[tree].choice) for tree in staying])
            # Append the tokens last: an out-of-memory error above leaves every response as it was.
            for response, trace in zip(self.active, traces, strict=True):
                response.token_ids.append(trace.token_id)
                response.trace.append(trace)
            self.stats.num_steps += len(traces)
            appended = list(zip(self.active, is_finished, strict=True))
            for scorer in self.roles.scorers.values():
                scorer.forget(self.active)
        return appended

    def _replace(self, tree: int) -> None:
        """Give the slot of a complete response to one that waits; remove it where none waits."""
        if not self.waiting:
            drop_from(self.active, tree)
            drop_from(self.reused, tree)
            for part in self.roles.by_role.values():
                part.drop_tree(tree)
            return
        response = self.waiting.popleft()
        self.active[tree], self.reused[tree] = response, None
        for engine in self.roles.engines.values():
            engine.clear(tree)
        for scorer in self.roles.scorers.values():
            scorer.replace_tree(tree, response.prompt)
        self._prefill([tree])
