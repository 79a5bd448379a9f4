"""The worker's side of the pipe: commands come as JSON lines on stdin, answers leave on stdout.

Only the standard library is imported here, because workers run in environments of their own.

A command is an object with the name of a handler under "command", and its arguments beside it. The
answer to it is one object; that of a handler that raised has the traceback under "error".
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """What the command `begin` says of a decode of Transfer Q*.

    Attributes:
        k: candidates a step.
        horizon: tokens of the greedy roll-out of each.
        alpha: divides Q.
        warm_steps: steps that `begin` takes before it answers.
        max_steps: steps of the whole decode.
    """

    k: int
    horizon: int
    alpha: float
    warm_steps: int
    max_steps: int


class Channel:
    """Messages to and from the program that started this process.

    Args:
        source: where commands are read.
        target: where answers are written.
    """

    def __init__(self, source: TextIO, target: TextIO) -> None:
        self.source = source
        self.target = target

    def receive(self) -> Message | None:
        """Wait for the next command; None after the last."""
        line = self.source.readline()
        return json.loads(line) if line else None

    def send(self, message: Message) -> None:
        self.target.write(json.dumps(message) + "\n")
        self.target.flush()


def take_stdout() -> TextIO:
    """Return a file for the answers; what libraries print on stdout goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers


def serve(channel: Channel, handlers: Mapping[str, Callable[..., Message]]) -> None:
    """Answer every command with what its handler returns, until there are no more."""
    while (message := channel.receive()) is not None:
        name = message.pop("command")
        try:
            answer = handlers[name](**message)
        except Exception:
            # The program at the other end raises what is said here.
            answer = {"error": f"{name} failed:\n{traceback.format_exc()}"}
        channel.send(answer)
