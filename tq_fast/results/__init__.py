"""The results of a decode: responses, traces, certificates and counts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidArgument, TqFastError
from ..prompts import Prompt
from .certificate import Certificate as Certificate
from .certificate import KlKind as KlKind
from .certificate import weakest_kl_kind as weakest_kl_kind
from .json_values import as_json, from_json, read_stage, read_step
from .stats import DecodeStats as DecodeStats
from .table import table_of
from .traces import ByValue
from .traces import StageTrace as StageTrace
from .traces import StepTrace as StepTrace

if TYPE_CHECKING:
    from .trace_figure import TraceFigure

# The number changes with what `save` writes.
_FORMAT = "tq_fast.DecodeResult 3"


@dataclasses.dataclass
class Response:
    """One prompt's response in the making: `idx` is the prompt's position in the call."""

    idx: int
    prompt: Prompt
    token_ids: list[int] = dataclasses.field(default_factory=list)
    trace: list[StepTrace] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        """Index of the token that is chosen next, from 0."""
        return len(self.token_ids)


@dataclasses.dataclass(frozen=True, eq=False)
class PromptResult(ByValue):
    """The response to one prompt: one entry of every list of `DecodeResult`."""

    text: str | None
    sequence: torch.Tensor
    trace: list[StepTrace]
    certificate: Certificate
    stages: list[StageTrace] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def carry_finished(results: Mapping[int, PromptResult]) -> Iterator[None]:
    """Set `finished`, token ids `[T]` by prompt, on an exception that ends the block."""
    try:
        yield
    except BaseException as error:
        # Any exception can carry the attribute, but only our own declare it.
        vars(error)["finished"] = {idx: result.sequence for idx, result in results.items()}
        raise


def _index_from_0(name: str, value: Any, num: int) -> int:
    """Return the index of one of `num` entries, which may be given as counted from their end."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return range(num)[operator.index(value)]
    except (IndexError, TypeError) as error:
        raise InvalidArgument(f"{name} must be an index below {num}, got {value!r}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class DecodeResult(ByValue):
    """Responses of one call, in the order of the prompts.

    There is one entry a prompt, or `num_return_sequences` of them in a row. Two results are equal
    where texts, tokens, traces and certificates are; `stats`, which holds times, does not count.

    Attributes:
        texts: responses as text, special tokens left out (`skip_special_tokens`) and the stop
            string too; None where there is no tokenizer.
        sequences: new token ids, int64 `[T]` on the CPU, the EOS token included.
        traces: a `StepTrace` for every token of every response.
        certificates: divergence and bound of every response.
        stats: counts over the whole call.
        stages: choices between whole texts or blocks, of the methods that make some; an empty list
            for a response of another method.
        prompts: the prompt of every response, as rewards see it: text, messages, or token ids where
            there is no tokenizer.
        tokenizer: of the language models, which pictures take the texts of candidates from. It is
            neither saved nor pickled.
    """

    texts: list[str] | None
    sequences: list[torch.Tensor]
    traces: list[list[StepTrace]]
    certificates: list[Certificate]
    stats: DecodeStats = dataclasses.field(compare=False)
    stages: list[list[StageTrace]] = dataclasses.field(default_factory=list)
    prompts: list[Any] = dataclasses.field(default_factory=list, compare=False)
    tokenizer: PreTrainedTokenizerBase | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "tokenizer": None}

    @staticmethod
    def collect(
        results: Sequence[PromptResult],
        stats: DecodeStats,
        *,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> DecodeResult:
        """Return the result of one call from those of its prompts."""
        return DecodeResult(
            texts=None if tokenizer is None else [result.text or "" for result in results],
            sequences=[result.sequence for result in results],
            traces=[result.trace for result in results],
            certificates=[result.certificate for result in results],
            stats=stats,
            stages=[result.stages for result in results],
            prompts=[prompt.given for prompt in prompts],
            tokenizer=tokenizer,
        )

    def plot_trace(self, idx: int = 0, steps: Sequence[int] | None = None) -> TraceFigure:
        """Draw how tokens of response `idx` were chosen, as a figure of matplotlib.

        A panel is a token: its candidates with their Q, in grey what the prior gives each, in blue
        the law that the token was drawn from, and the choice in bold behind a mark. A candidate
        that was not needed, because bounds on the reward settled the choice, has no Q. Without a
        tokenizer (`load` gives none) candidates are token ids.

        Args:
            idx: the position of the response.
            steps: indices of the tokens; None: the six that moved furthest from the prior.

        Raises:
            InvalidArgument: there is no such response or token, or the method chose it without
                candidates, between whole texts.
            TqFastError: matplotlib is not installed (the extra `plots`).
        """
        idx = _index_from_0("idx", idx, len(self.traces))
        trace = self.traces[idx]
        if steps is not None:
            if not isinstance(steps, Iterable) or not (steps := list(steps)):
                raise InvalidArgument(
                    f"steps must be indices of tokens, one at least, got {steps!r}; None draws "
                    "those that moved furthest"
                )
            steps = [_index_from_0("steps", step, len(trace)) for step in steps]
        if max((len(step.candidates) for step in trace), default=0) < 2:
            raise InvalidArgument(
                f"response {idx} has no candidates to draw: its method does not choose among "
                "tokens by their Q; `stages` has the choices between texts, where it makes some"
            )
        try:
            from .trace_figure import furthest_steps, trace_figure
        except ModuleNotFoundError as error:
            raise TqFastError(
                "plot_trace needs matplotlib: pip install 'tq-fast[plots]'"
            ) from error
        drawn = [as_json(step, lambda number: None) for step in trace]
        if self.tokenizer is not None:
            for step in drawn:
                step["texts"] = [self.tokenizer.decode([token]) for token in step["candidates"]]
        title = f"Response {idx}"
        if steps is None:
            steps = furthest_steps(drawn)
            if len(steps) < len(trace):
                title += ": the steps that moved furthest from the prior"
        return trace_figure(drawn, title, steps, self._before(idx))

    def _before(self, idx: int) -> Callable[[int], str]:
        """The end of a response's text before the token of a step."""
        tokenizer, ids = self.tokenizer, self.sequences[idx].tolist()

        def before(step: int) -> str:
            return "" if tokenizer is None else str(tokenizer.decode(ids[max(0, step - 8) : step]))

        return before

    def _repr_html_(self) -> str:
        return table_of(self)

    def _repr_pretty_(self, printer: Any, is_cycle: bool) -> None:
        """What IPython writes where it shows no HTML; all traces would be pages of numbers."""
        num = len(self.sequences)
        printer.text(f"DecodeResult of {num} {'response' if num == 1 else 'responses'}")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as lists, dicts and numbers, ready for JSON.

        A number that is not finite becomes None; `save` keeps it.
        """
        result: dict[str, Any] = as_json(self, lambda number: None)
        return result

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file that `load` reads; numbers that are not finite are texts in it."""
        result = {"format": _FORMAT, **as_json(self, str)}
        text = json.dumps(result, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> DecodeResult:
        """Return the result that `save` wrote, with equal values and dtypes.

        Raises:
            InvalidArgument: the file holds something else.
            OSError: it cannot be read.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if (found := saved.pop("format")) != _FORMAT:
                raise ValueError(f"its format is {found!r}, {_FORMAT!r} was expected")
            return DecodeResult(
                texts=saved["texts"],
                sequences=[torch.tensor(ids, dtype=torch.int64) for ids in saved["sequences"]],
                traces=[[read_step(step) for step in trace] for trace in saved["traces"]],
                certificates=[Certificate(**from_json(entry)) for entry in saved["certificates"]],
                stats=DecodeStats(**saved["stats"]),
                stages=[[read_stage(stage) for stage in stages] for stages in saved["stages"]],
                prompts=saved["prompts"],
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidArgument(
                f"{os.fspath(path)!r} must be a file that DecodeResult.save wrote: {error}"
            ) from error
