"""A function as a reward, in this package's form or in TRL's."""

from __future__ import annotations

import abc
import copy
import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidArgument
from ..prompts import Prompt
from .base import Opening, Reward, RewardFunction, RewardSession, Texts, drop_from
from .returned import read_scores

SIGNATURE = "(prompts, responses) -> floats, or TRL's (prompts=, completions=, **kwargs)"


class AskedReward(Reward):
    """A reward that is asked with prompts and responses, all of one call together."""

    texts: Texts

    @abc.abstractmethod
    def ask(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> list[float]:
        """Return a score for each response (new token ids) to its prompt."""

    def open(self, opening: Opening) -> RewardSession:
        """Start on the prompts of a forest."""
        return _AskedSession(self, opening.prompts)


class _AskedSession:
    num_token_forwards = 0
    peak_kv_bytes = 0

    def __init__(self, reward: AskedReward, prompts: Sequence[Prompt]) -> None:
        self.reward = reward
        self.prompts = list(prompts)

    def score(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        return self.reward.ask([self.prompts[tree] for tree in trees], responses)

    def keep(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> None:
        return

    def replace_tree(self, tree: int, prompt: Prompt) -> None:
        self.prompts[tree] = prompt

    def drop_tree(self, tree: int) -> None:
        drop_from(self.prompts, tree)


class FunctionReward(AskedReward):
    """A function `(prompts, responses) -> floats`, or a reward function of TRL.

    It gets copies of the prompts as they were given (token ids as text) and the responses as text,
    special tokens left out; without a tokenizer both are lists of token ids. A function with an
    argument `completions` is called as TRL does: by keyword, the responses to chats as messages.

    Args:
        function: the function, an object that can be called or a module.
        texts: decodes with the baseline's tokenizer.
        role: the argument's name, for messages.

    Raises:
        InvalidArgument: it cannot be called so, or must be awaited; the message says what is
            expected.
    """

    def __init__(self, function: RewardFunction, texts: Texts, role: str = "reward") -> None:
        self.source = self.function = function
        self.texts = texts
        self.model = function if isinstance(function, torch.nn.Module) else None
        self._keywords = _trl_keywords(function, role)

    def ask(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> list[float]:
        """Call the function once; with TRL's form once for texts and once for chats."""
        given = [copy.deepcopy(prompt.given) for prompt in prompts]
        shown: list[Any] = [list(ids) for ids in responses]
        if self.texts.tokenizer is not None:
            shown = [self.texts.response(ids) for ids in responses]
        if self._keywords is None:
            return read_scores(self.function(given, shown))
        scores = [0.0] * len(given)
        are_chats = [_is_chat(prompt) for prompt in given]
        for is_chat in sorted(set(are_chats)):
            chosen = [i for i, chat in enumerate(are_chats) if chat == is_chat]
            arguments: dict[str, Any] = {
                "prompts": [given[i] for i in chosen],
                "completions": [_as_completion(shown[i], is_chat) for i in chosen],
                "completion_ids": [list(responses[i]) for i in chosen],
            }
            taken = {name: arguments[name] for name in self._keywords}
            found = read_scores(self.function(**taken))
            if len(found) != len(chosen):
                return found
            for i, score in zip(chosen, found, strict=True):
                scores[i] = score
        return scores


def load_function(name: str, role: str) -> Any:
    """Return what `package.module:name` names; the working directory is looked in first.

    Raises:
        InvalidArgument: there is no such module, importing it fails, or it has no such name.
    """
    module_name, _, path = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise InvalidArgument(f"{role}={name!r}: there is no module {missing!r}") from error
        raise InvalidArgument(
            f"{role}={name!r}: importing {module_name!r} raised {error!r}"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    for part in path.split("."):
        if not hasattr(found, part):
            raise InvalidArgument(f"{role}={name!r}: {module_name!r} has no {path!r}")
        found = getattr(found, part)
    return found


def names_a_function(name: str) -> bool:
    """Whether `name` has the form `package.module:name`, and is no folder."""
    word = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
    return re.fullmatch(f"{word}:{word}", name) is not None and not Path(name).is_dir()


def _trl_keywords(function: Callable[..., Any], role: str) -> tuple[str, ...] | None:
    """The keywords of TRL's that `function` takes; None where it is called by position."""
    called: Any = function.forward if isinstance(function, torch.nn.Module) else function
    if _is_awaited(called) or _is_awaited(type(called).__call__):
        raise InvalidArgument(
            f"{role} is a coroutine function, which is not awaited; a function {SIGNATURE} is "
            "expected"
        )
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):
        # Some functions of compiled modules have none.
        return None
    parameters = signature.parameters
    trial: tuple[Any, ...] = ([], [])
    keywords = None
    if "completions" in parameters:
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        known = ("prompts", "completions", "completion_ids")
        keywords, trial = tuple(n for n in known if takes_all or n in parameters), ()
    try:
        signature.bind(*trial, **dict.fromkeys(keywords or ()))
    except TypeError as error:
        raise InvalidArgument(
            f"{role} must be a function {SIGNATURE}; {getattr(function, '__name__', function)!r} "
            f"has the signature {signature}: {error}"
        ) from error
    return keywords


def _is_awaited(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _is_chat(given: Any) -> bool:
    return not isinstance(given, str) and bool(given) and not isinstance(given[0], int)


def _as_completion(shown: Any, is_chat: bool) -> Any:
    return [{"role": "assistant", "content": shown}] if is_chat else shown
