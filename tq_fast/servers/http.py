"""The connection to a server: many requests at a time, tried again while the server stays away.

Requests run in an event loop on a thread of its own, so that a caller with a running loop, as a
notebook has, can wait for them like for any function. A request that is given up closes its
connection, at which the server stops the work on it.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import httpx2

from ..errors import InvalidArgument, ServerUnavailable
from .server import Server

# Waits between retries double up to this many seconds.
_LONGEST_WAIT = 30.0
# Characters of what a server answered that a message shows.
_MAX_DETAIL = 500


class RequestRefused(InvalidArgument):
    """A request that the server refuses and would refuse again.

    Attributes:
        status: the HTTP status.
        detail: what the server says.
    """

    # All but the message have defaults, so that the exception can be pickled.
    def __init__(self, message: str, status: int = 0, detail: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


class Connection:
    """A connection to one server, which reuses its sockets.

    It ends by `close`, or with the object.

    Args:
        server: where it is, and how patient to be.
    """

    def __init__(self, server: Server) -> None:
        self.server = server
        self._key = server.read_api_key()
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx2.Timeout(server.timeout, connect=server.connect_timeout, pool=None),
            limits=httpx2.Limits(
                max_connections=server.max_concurrent,
                max_keepalive_connections=server.max_concurrent,
            ),
        )
        # The jitter has a generator of its own, so that the caller's `random` stays untouched.
        self._jitter = random.Random()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=_serve,
            args=(self._loop, self._client),
            name="tq_fast server connection",
            daemon=True,
        )
        self._thread.start()
        # Garbage may be collected on any thread, this loop's own included: the loop is asked to
        # stop, and nobody waits for it.
        self._end = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    def get(self, path: str) -> Any:
        """Return the JSON at `path`, or the text where it is none."""
        return self._run([("GET", path, None)], None)[0]

    def post(
        self,
        path: str,
        bodies: Sequence[Any],
        fault: Callable[[Any], str | None] | None = None,
    ) -> list[Any]:
        """Return the JSON that the server answers to each of `bodies`.

        Args:
            path: from the server's root on.
            bodies: each is sent as JSON in a request of its own.
            fault: says what an answer lacks, None where it is whole. Such a request is sent again.

        Raises:
            RequestRefused: the server refuses a request for what it is.
            ServerUnavailable: it gave no whole answer to a request however often it was sent.
        """
        return self._run([("POST", path, body) for body in bodies], fault)

    def close(self) -> None:
        """Close all sockets; the connection cannot be used again."""
        self._end()
        self._thread.join()

    def _run(
        self,
        requests: Sequence[tuple[str, str, Any]],
        fault: Callable[[Any], str | None] | None,
    ) -> list[Any]:
        future = asyncio.run_coroutine_threadsafe(self._answer_all(requests, fault), self._loop)
        try:
            return future.result()
        finally:
            # Where the caller was interrupted, the requests are given up, too.
            future.cancel()

    async def _answer_all(
        self,
        requests: Sequence[tuple[str, str, Any]],
        fault: Callable[[Any], str | None] | None,
    ) -> list[Any]:
        # A request that waits to be sent again keeps its slot, so that a server that is overloaded
        # does not get the others instead.
        slots = asyncio.Semaphore(self.server.max_concurrent)

        async def answer(method: str, path: str, body: Any) -> Any:
            async with slots:
                return await self._answer(method, path, body, fault)

        tasks = [asyncio.ensure_future(answer(*request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(
        self, method: str, path: str, body: Any, fault: Callable[[Any], str | None] | None
    ) -> Any:
        """Send one request until it is answered or was sent too often."""
        request, start = f"{method} {self.server.root}{path}", time.monotonic()
        reason: str | None
        for retry in range(self.server.retries + 1):
            asked_wait, reason = 0.0, None
            try:
                response = await self._client.request(method, self.server.root + path, json=body)
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if not _is_transient(response.status_code):
                    answer = self._read(request, response)
                    reason = fault(answer) if fault else None
                    if reason is None:
                        return answer
                else:
                    reason = f"status {response.status_code}: {self._detail(response)}"
                    asked_wait = _retry_after(response)
            wait = min(self.server.backoff * 2.0**retry, _LONGEST_WAIT)
            wait = max(wait * self._jitter.uniform(0.5, 1.0), asked_wait)
            if retry == self.server.retries or asked_wait > self.server.timeout:
                break
            await asyncio.sleep(wait)
        seconds = time.monotonic() - start
        asked = f"; it asks to wait {asked_wait:.0f} s" if asked_wait > self.server.timeout else ""
        raise ServerUnavailable(
            f"{request} was tried {retry + 1} times over {seconds:.1f} s without an answer{asked}; "
            f"the last time: {reason}"
        )

    def _read(self, request: str, response: httpx2.Response) -> Any:
        if response.status_code in (401, 403):
            name = self.server.api_key_env
            advice = (
                f"the server refuses the key in the environment variable {name}"
                if self._key
                else f"the server asks for a key: put it into the environment variable {name}"
            )
            raise _refusal(request, response.status_code, advice)
        if not response.is_success:
            raise _refusal(request, response.status_code, self._detail(response))
        try:
            return response.json()
        except ValueError:
            if response.request.method == "GET":
                return response.text
            detail = f"this is no JSON, is the URL right? {self._detail(response)}"
            raise _refusal(request, response.status_code, detail) from None

    def _detail(self, response: httpx2.Response) -> str:
        """What the server says of an error, as it stands in its JSON; never the key."""
        try:
            said = response.json()
            detail = str(said.get("error", said).get("message", said.get("detail", said)))
        except (ValueError, AttributeError):
            detail = response.text
        if self._key:
            detail = detail.replace(self._key, "***")
        return detail[:_MAX_DETAIL] or response.reason_phrase


def _serve(loop: asyncio.AbstractEventLoop, client: httpx2.AsyncClient) -> None:
    """Run `loop` until it is stopped, then close the sockets of `client`.

    The thread must not hold the `Connection`, which would then live as long as its own thread.
    """
    loop.run_forever()
    loop.run_until_complete(client.aclose())
    loop.close()


def _refusal(request: str, status: int, detail: str) -> RequestRefused:
    message = f"{request} was refused with status {status}: {detail}"
    return RequestRefused(message, status, detail)


def _is_transient(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait, 0 where it asks for nothing that can be read."""
    said = response.headers.get("Retry-After", "").strip()
    if said.isdigit():
        return float(said)
    try:
        return max(email.utils.parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0
