"""Workers that may die at any moment: what they had not finished runs again.

A worker is an actor of Ray; where one dies, another is started wherever there is room. What is to
do and what is finished is kept here, in the process that asked.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, Protocol, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from ..errors import TqFastError
from ..jobs.records import is_lost_device
from .cluster import Cluster

_Item = TypeVar("_Item")
_Message = TypeVar("_Message")

# So many workers in turn that die while they load end the job.
_MAX_LOADS = 3
# A prompt that is alone in so many workers in turn when they die gets an error record.
_MAX_DEATHS = 3
# So many deaths with nothing finished in between end the job, whatever the workers were doing.
_MAX_FRUITLESS = 20


class WorkerLost(TqFastError):
    """The worker of a prompt died again and again while it decoded that prompt alone."""


class _DeviceLost(TqFastError):
    """The device is lost to the process of the worker, which must begin again."""


class Worker(Protocol):
    """What an actor does."""

    def describe(self) -> Any:
        """Return what is to be known of it before it begins."""
        ...

    def run(self, head: Any, items: Mapping[int, Any]) -> Iterator[tuple[int | None, Any]]:
        """Iterate over messages: the one of each item under its key, others under None."""
        ...


@dataclasses.dataclass(frozen=True)
class Group(Generic[_Item]):
    """Items that one worker gets together.

    Attributes:
        head: what is true of all of them.
        items: by key; a key is never in two groups.
        deaths: how often a worker died over this item, which is alone then.
    """

    head: Any
    items: Mapping[int, _Item]
    deaths: int = 0

    def halves(self) -> list[Group[_Item]]:
        """Return two groups of half the size."""
        keys = list(self.items)
        middle = (len(keys) + 1) // 2
        parts = (keys[:middle], keys[middle:])
        return [Group(self.head, {key: self.items[key] for key in part}) for part in parts]


class _Host:
    """The process of a worker.

    Args:
        make: makes the worker, at the first call: its errors are then those of the call.
        num_threads: of torch.
        folder: of the process that asked; relative names are meant from there.
    """

    def __init__(self, make: Callable[[], Any], num_threads: int, folder: str) -> None:
        self._make = make
        self._num_threads = num_threads
        self._folder = folder
        self._worker: Any = None

    def ask(self, name: str, *arguments: Any) -> Any:
        """Return what a method of the worker answers."""
        return getattr(self._loaded(), name)(*arguments)

    def run(self, head: Any, items: Mapping[int, Any]) -> Iterator[tuple[int | None, Any]]:
        """Iterate over the messages of the worker."""
        try:
            yield from self._loaded().run(head, items)
        except Exception as error:
            # On the way to the other process an error loses its cause, by which this one is known.
            if is_lost_device(error):
                raise _DeviceLost(str(error)) from error
            raise

    def _loaded(self) -> Any:
        if self._worker is None:
            enter(self._folder, self._num_threads)
            self._worker = self._make()
        return self._worker


def enter(folder: str, num_threads: int) -> None:
    """Make this process one of the job's: relative names and modules are found as in `folder`.

    A machine that has no such folder has its models by hub ids and absolute names alone.
    """
    torch.set_num_threads(num_threads)
    if os.path.isdir(folder):
        os.chdir(folder)
        sys.path.insert(0, folder)


@dataclasses.dataclass
class _Call(Generic[_Item]):
    """What an actor is busy with: a group, or (None) with loading, for the how-many-th time."""

    host: Any
    group: Group[_Item] | None
    num_loads: int = 1
    done: set[int] = dataclasses.field(default_factory=set)


class WorkerPool(Generic[_Item, _Message]):
    """Actors of one kind.

    Args:
        make: makes the worker inside of an actor: a `Worker`, or what `ask` alone is for.
        cluster: how many, with what; every number is settled.
        say: gets a sentence about each death.
    """

    def __init__(
        self, make: Callable[[], Any], cluster: Cluster, say: Callable[[str], None]
    ) -> None:
        # Ray would start an actor again by itself, but fails calls that come before it has.
        host = ray.remote(_Host).options(
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        self._start = functools.partial(host.remote, make, cluster.cpus_per_worker, os.getcwd())
        self._say = say
        self._hosts = [self._start() for _ in range(cluster.workers or 1)]
        self._num_fruitless = 0
        self._calls: dict[Any, _Call[_Item]] = {}
        self._waiting: deque[Group[_Item]] = deque()
        self._idle: list[Any] = []
        self._left: set[int] = set()

    def close(self) -> None:
        """End every worker."""
        for host in self._hosts:
            ray.kill(host)

    def ask(self, name: str, *arguments: Any) -> Any:
        """Return what the method `name` of one worker answers; its errors are raised as its own.

        Raises:
            TqFastError: the worker died again and again.
        """
        for num_loads in itertools.count(1):
            host = self._hosts[0]
            try:
                return ray.get(host.ask.remote(name, *arguments))
            except RayTaskError as error:
                raise error.cause from error
            except RayError as error:
                if num_loads == _MAX_LOADS:
                    raise _died_at_once(error) from error
                self._replace(host)
        raise AssertionError("unreachable")

    def run(
        self,
        groups: Iterable[Group[_Item]],
        on_message: Callable[[Any, _Message], None],
        on_lost: Callable[[Any, int, WorkerLost], None],
        check: Callable[[Any], None],
    ) -> None:
        """Carry out `groups`.

        Args:
            groups: what is to do.
            on_message: called with the head of a group and each of its messages.
            on_lost: called with head and key of an item over which workers die.
            check: called with what each worker describes; may refuse it.

        Raises:
            TqFastError: a worker cannot load, or the cluster is lost; what is finished is kept.
            Exception: what a worker raised.
        """
        self._waiting = deque(groups)
        self._left = {key for group in self._waiting for key in group.items}
        try:
            for host in self._hosts if self._left else ():
                self._load(host, 1)
            while self._left:
                (ready,), _ = ray.wait(list(self._calls), num_returns=1)
                self._hear(ready, on_message, on_lost, check)
        except RayError as error:
            raise TqFastError(
                f"Ray failed: {error}; what is finished is kept, and the same command goes on "
                "from there"
            ) from error

    def _load(self, host: Any, num_loads: int) -> None:
        self._calls[host.ask.remote("describe")] = _Call(host, None, num_loads)

    def _replace(self, host: Any) -> Any:
        """Start a worker in the place of `host`, which is dead or out of reach."""
        ray.kill(host)
        successor = self._start()
        self._hosts[self._hosts.index(host)] = successor
        return successor

    def _next(self, host: Any) -> None:
        """Give the next group to `host`."""
        if not self._waiting:
            self._idle.append(host)
            return
        group = self._waiting.popleft()
        run = host.run.options(num_returns="streaming").remote(group.head, group.items)
        self._calls[run] = _Call(host, group)

    def _hear(
        self,
        ready: Any,
        on_message: Callable[[Any, _Message], None],
        on_lost: Callable[[Any, int, WorkerLost], None],
        check: Callable[[Any], None],
    ) -> None:
        """Take what a worker has to say: its description, a message, its end, or its death."""
        call = self._calls[ready]
        try:
            try:
                answer = ray.get(ready if call.group is None else next(ready))
            except StopIteration:
                del self._calls[ready]
                self._next(call.host)
                return
        except RayTaskError as error:
            if not isinstance(error.cause, _DeviceLost):
                raise error.cause from error
            # Nothing runs any more in a process that has lost its device.
            self._bury(ready, error, on_lost)
            return
        except RayError as error:
            self._bury(ready, error, on_lost)
            return
        if call.group is None:
            check(answer)
            del self._calls[ready]
            self._next(call.host)
            return
        self._num_fruitless = 0
        key, message = answer
        on_message(call.group.head, message)
        if key is not None:
            call.done.add(key)
            self._left.discard(key)

    def _bury(
        self, ready: Any, error: RayError, on_lost: Callable[[Any, int, WorkerLost], None]
    ) -> None:
        """Put back what a dead worker had not finished, and load its successor."""
        call = self._calls.pop(ready)
        if call.group is None and call.num_loads == _MAX_LOADS:
            raise _died_at_once(error) from error
        self._num_fruitless += 1
        if self._num_fruitless == _MAX_FRUITLESS:
            raise TqFastError(
                f"workers died {_MAX_FRUITLESS} times and finished nothing in between; what was "
                f"finished before is kept, and the same command goes on from there: {error}"
            ) from error
        successor = self._replace(call.host)
        if call.group is None:
            self._load(successor, call.num_loads + 1)
            return
        self._load(successor, 1)
        left = {key: item for key, item in call.group.items.items() if key not in call.done}
        group = Group(call.group.head, left, call.group.deaths + 1)
        self._say(f"a worker died; what it had not finished ({len(left)}) runs again")
        if call.done:
            # It came on: nothing says that one of the others brings workers down.
            self._waiting.appendleft(dataclasses.replace(group, deaths=0))
        elif len(left) > 1:
            self._waiting.extendleft(reversed(group.halves()))
        elif group.deaths < _MAX_DEATHS:
            self._waiting.appendleft(group)
        else:
            (key,) = left
            lost = WorkerLost(f"{group.deaths} workers in turn died while they decoded it alone")
            on_lost(group.head, key, lost)
            self._left.discard(key)
        while self._idle and self._waiting:
            self._next(self._idle.pop())


def _died_at_once(error: RayError) -> TqFastError:
    return TqFastError(
        f"{_MAX_LOADS} workers in turn died while they loaded the models, perhaps for want of "
        f"memory; what is finished is kept, and the same command goes on from there: {error}"
    )
