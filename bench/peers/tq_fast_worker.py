"""tq_fast as a worker of `bench.peers`."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from typing import cast
from unittest import mock

import torch
import transformers
from transformers import PreTrainedModel

import tq_fast
from bench.decode_models import DTYPES
from bench.peers.serving import Channel, DecodeSettings, Message, serve, take_stdout
from tq_fast.forest.language import LanguageForest
from tq_fast.presets import open_method
from tq_fast.presets.call import OpenMethod
from tq_fast.results import DecodeStats, StepTrace


class TqFastWorker:
    """Two models, and the decode that they are in.

    Args:
        folder: holds the models `baseline` and `reward`.
        dtype: "fp32" or "bf16".
        channel: commands come from there in the midst of a decode, too.
    """

    def __init__(self, folder: str, dtype: str, channel: Channel) -> None:
        self.decoder = tq_fast.TransferDecoder(
            f"{folder}/baseline", f"{folder}/reward", device="cpu", dtype=DTYPES[dtype]
        )
        self.baseline = cast(PreTrainedModel, self.decoder.baseline)
        self.channel = channel
        self.steps: list[list[Message]] = []

    def describe(self) -> Message:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        return {"versions": versions, "num_threads": torch.get_num_threads()}

    def begin(self, prompts: list[list[int]], settings: Message) -> Message:
        """Decode `max_steps` tokens, and answer after the first `warm_steps` of them.

        A decode runs in one call. The commands `decode` that follow are read and answered within
        it, each when as many steps as it asks for are done.
        """
        given = DecodeSettings(**settings)
        turn = Turn(num_prompts=len(prompts), num_steps=given.warm_steps)

        def on_token(idx: int) -> None:
            # The answer of the last turn is what this method returns.
            if turn.count(idx) and turn.num_done < given.max_steps:
                self.channel.send(turn.answer())
                message = self.channel.receive()
                if message is None:
                    raise SystemExit("the commands ended in the midst of a decode")
                if message["command"] != "decode":
                    raise ValueError(f"a decode is going on, got the command {message}")
                turn.begin(message["num_steps"])

        with _phases_added_to(turn):
            result = self.decoder.decode(
                [torch.tensor(prompt) for prompt in prompts],
                k=given.k,
                num_rollouts=1,
                horizon=given.horizon,
                alpha=given.alpha,
                strategy="greedy",
                rollout="greedy",
                max_new_tokens=given.max_steps,
                eos_token_id=(),
                batch_size=len(prompts),
                on_token=on_token,
            )
        self.steps = [[_record(step) for step in trace] for trace in result.traces]
        return turn.answer()

    def end(self) -> Message:
        """Return the record of every step, by prompt."""
        return {"steps": self.steps}

    @torch.inference_mode()
    def encode(self, prompt: list[int]) -> Message:
        # A decoder keeps its forests from call to call, too.
        forest = self._forest(len(prompt))
        start = time.perf_counter()
        forest.begin(1)
        forest.encode([0], [prompt])
        token = int(forest.next_logits[0].argmax())
        return {"seconds": time.perf_counter() - start, "next_token": token}

    def sample(self, prompt: list[int], number: int, num_tokens: int) -> Message:
        method = self._sampler(number, num_tokens)
        start = time.perf_counter()
        result = method.decode([torch.tensor(prompt)], batch_size=number)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "lengths": [len(ids) for ids in result.sequences]}

    # The worker lives as long as its process.
    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _forest(self, capacity: int) -> LanguageForest:
        return LanguageForest(
            self.baseline,
            num_trees=1,
            num_rows=1,
            prefix_capacity=capacity,
            branch_capacity=1,
            backend=None,
        )

    # The worker lives as long as its process.
    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _sampler(self, number: int, num_tokens: int) -> OpenMethod:
        return open_method(
            "sft",
            sft=self.baseline,
            max_new_tokens=num_tokens,
            num_return_sequences=number,
            eos_token_id=(),
        )


class Turn:
    """The steps between two answers in a decode.

    Args:
        num_prompts: each has a token in a step.
        num_steps: steps of the first turn.

    Attributes:
        phases: seconds of the turn by phase.
        num_done: steps of all turns so far.
    """

    def __init__(self, *, num_prompts: int, num_steps: int) -> None:
        self._counts = [0] * num_prompts
        self.num_done = 0
        self.begin(num_steps)

    def begin(self, num_steps: int) -> None:
        """Let a turn of so many steps begin now."""
        self.phases: dict[str, float] = {}
        self._seconds: list[float] = []
        self._num_steps = num_steps
        self._mark = time.perf_counter()

    def count(self, idx: int) -> bool:
        """Note a token of prompt `idx`; return whether the turn's last step ends with it."""
        self._counts[idx] += 1
        if len(set(self._counts)) > 1:
            return False
        now = time.perf_counter()
        self._seconds.append(now - self._mark)
        self._mark = now
        self.num_done += 1
        return len(self._seconds) == self._num_steps

    def answer(self) -> Message:
        return {"seconds": self._seconds, "phases": self.phases}


@contextlib.contextmanager
def _phases_added_to(turn: Turn) -> Iterator[None]:
    """Add the seconds of every phase to the turn that it ends in."""
    phase = DecodeStats.phase

    @contextlib.contextmanager
    def watched(stats: DecodeStats, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with phase(stats, name):
            yield
        turn.phases[name] = turn.phases.get(name, 0.0) + time.perf_counter() - start

    with mock.patch.object(DecodeStats, "phase", watched):
        yield


def _record(step: StepTrace) -> Message:
    return {
        "candidates": step.candidates.tolist(),
        "prior": step.prior_logprobs.tolist(),
        "q": step.q.tolist(),
        "choice": step.token_id,
    }


def main() -> None:
    answers = take_stdout()
    parser = argparse.ArgumentParser(prog="bench.peers.tq_fast_worker")
    parser.add_argument("folder")
    parser.add_argument("dtype", choices=list(DTYPES))
    args = parser.parse_args()
    channel = Channel(sys.stdin, answers)
    worker = TqFastWorker(args.folder, args.dtype, channel)
    names = ("describe", "begin", "end", "encode", "sample")
    serve(channel, {name: getattr(worker, name) for name in names})


if __name__ == "__main__":
    main()
