"""The connection: what is tried again, what is not, how it ends, and what it never says."""

from __future__ import annotations

import asyncio
import concurrent.futures
import email.utils
import logging
import pickle
import random
import socket
import time

import pytest

import tq_fast
from tests.servers.conftest import patient
from tests.servers.fake_server import NAME
from tq_fast import ServerUnavailable
from tq_fast.servers.http import Connection, RequestRefused
from tq_fast.servers.operations import SamplingLaw, completion_body

BODY = completion_body(NAME, SamplingLaw(0.0), [[1, 2]], 1, logprobs=1)
PATH = "/v1/completions"


@pytest.fixture
def fake(serve, model):
    return serve(model)


@pytest.fixture
def connect():
    opened: list[Connection] = []

    def connect_to(server: tq_fast.Server) -> Connection:
        opened.append(Connection(server))
        return opened[-1]

    yield connect_to
    for connection in opened:
        connection.close()


@pytest.mark.parametrize(
    "failure", [500, 502, 503, 429, 408, "drop", (429, {"Retry-After": "0"})], ids=str
)
def test_a_failure_that_passes_is_tried_again(fake, connect, failure):
    connection = connect(patient(fake))
    expected = connection.post(PATH, [BODY])
    fake.failures += [failure, failure, failure]
    assert connection.post(PATH, [BODY]) == expected
    assert not fake.failures


@pytest.mark.parametrize("failure", [500, "drop"])
def test_a_server_that_stays_away_is_named_with_what_was_tried(fake, connect, failure):
    connection = connect(patient(fake))
    fake.failures += [failure] * 4
    with pytest.raises(ServerUnavailable) as end:
        connection.post(PATH, [BODY])
    assert str(end.value).startswith(
        f"POST {fake.url.removesuffix('/v1')}/v1/completions was tried 4 times over 0."
    )
    assert ("status 500: as the test asked" if failure == 500 else "Error") in str(end.value)
    assert isinstance(end.value, tq_fast.TqFastError)
    # The connection is as good as new.
    assert connection.post(PATH, [BODY])


def test_a_port_where_nobody_listens_ends_clearly(connect):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = tq_fast.Server(f"http://127.0.0.1:{port}/v1", retries=2, backoff=0.001)
    with pytest.raises(
        ServerUnavailable, match=rf"GET http://127.0.0.1:{port}/v1/models was tried 3"
    ):
        connect(server).get("/v1/models")


def test_a_server_that_is_too_slow_is_tried_again(fake, connect):
    connection = connect(patient(fake, timeout=0.2))
    fake.failures += [1.0]
    assert connection.post(PATH, [BODY])
    fake.failures += [1.0] * 4
    with pytest.raises(ServerUnavailable, match=r"tried 4 times .* the last time: ReadTimeout"):
        connection.post(PATH, [BODY])


def test_waits_grow_are_jittered_and_end_at_thirty_seconds(fake, connect, monkeypatch):
    waits = record_waits(monkeypatch)
    fake.failures += [503] * 10
    assert connect(patient(fake, retries=10, backoff=0.5)).post(PATH, [BODY])
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert all(long / 2 <= wait <= long for wait, long in zip(waits, longest, strict=True))
    assert len(set(waits)) == len(waits)


def record_waits(monkeypatch):
    waits: list[float] = []
    sleep = asyncio.sleep

    async def no_sleep(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    return waits


@pytest.mark.parametrize("is_date", [False, True])
def test_retry_after_is_honoured(fake, connect, monkeypatch, is_date):
    waits = record_waits(monkeypatch)
    said = email.utils.formatdate(time.time() + 9, usegmt=True) if is_date else "9"
    fake.failures += [(429, {"Retry-After": said}), (503, {"Retry-After": "soon"})]
    assert connect(patient(fake)).post(PATH, [BODY])
    assert waits[0] == pytest.approx(9, abs=1.5)
    assert waits[1] < 0.1


def test_a_server_that_asks_for_too_long_a_wait_ends_at_once(fake, connect):
    fake.failures += [(429, {"Retry-After": "86400"})]
    with pytest.raises(ServerUnavailable, match=r"tried 1 times .* asks to wait 86400 s"):
        connect(patient(fake)).post(PATH, [BODY])


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_refusal_is_not_tried_again(fake, connect, status):
    fake.failures += [status, 500]
    with pytest.raises(RequestRefused, match=f"status {status}: as the test asked") as refusal:
        connect(patient(fake)).post(PATH, [BODY])
    assert refusal.value.status == status
    assert list(fake.failures) == [500]
    assert pickle.loads(pickle.dumps(refusal.value)).detail == "as the test asked"


def test_requests_go_together_as_many_as_allowed_and_reuse_their_sockets(fake, connect):
    connection = connect(patient(fake, max_concurrent=4))
    fake.failures += [0.05] * 12
    bodies = [{**BODY, "prompt": [[i]]} for i in range(12)]
    answers = connection.post(PATH, bodies)
    assert fake.most_at_once == 4
    assert [connection.post(PATH, [body])[0] for body in bodies] == answers
    assert fake.connections == 4


def test_the_first_request_that_fails_for_good_ends_the_others(fake, connect):
    connection = connect(patient(fake, max_concurrent=2))
    fake.failures.append(400)
    with pytest.raises(RequestRefused):
        connection.post(PATH, [BODY] * 200)
    assert len(fake.requests) < 100


def test_an_interrupt_gives_up_the_requests(fake, connect, monkeypatch):
    connection = connect(patient(fake))
    fake.failures += [0.3] * 3
    wait = concurrent.futures.Future.result

    def interrupted(future, timeout=None):
        monkeypatch.setattr(concurrent.futures.Future, "result", wait)
        raise KeyboardInterrupt

    monkeypatch.setattr(concurrent.futures.Future, "result", interrupted)
    with pytest.raises(KeyboardInterrupt):
        connection.post(PATH, [BODY] * 200)
    # The others were never sent, and the connection is as good as new.
    assert connection.post(PATH, [BODY])
    assert len(fake.requests) < 100


def test_it_works_where_an_event_loop_runs_already(fake, connect):
    async def inside() -> object:
        return connect(patient(fake)).post(PATH, [BODY])

    assert asyncio.run(inside())


def test_the_callers_random_numbers_stay_as_they_were(fake, connect):
    fake.failures += [500]
    random.seed(3)
    expected = random.random()
    random.seed(3)
    connect(patient(fake)).post(PATH, [BODY])
    assert random.random() == expected


def test_an_answer_that_is_no_json_is_refused(fake, connect):
    connection = connect(patient(fake))
    assert "cache_config_info" in connection.get("/metrics")
    fake.post = lambda *args: "<html>welcome</html>"
    with pytest.raises(RequestRefused, match="this is no JSON, is the URL right"):
        connection.post(PATH, [BODY])


KEY = "s3cret-key"


@pytest.fixture
def guarded(serve, model):
    return serve(model, key=KEY)


def test_the_key_is_sent(guarded, connect, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    assert connect(patient(guarded)).post(PATH, [BODY])
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.delenv("VLLM_API_KEY")
    assert connect(patient(guarded, api_key_env="MY_KEY")).post(PATH, [BODY])


def test_a_missing_and_a_wrong_key_are_named_by_their_variable(guarded, connect, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(RequestRefused, match="put it into the environment variable VLLM_API_KEY"):
        connect(patient(guarded)).post(PATH, [BODY])
    monkeypatch.setenv("VLLM_API_KEY", "wr0ng")
    with pytest.raises(RequestRefused, match=r"refuses the key in .* VLLM_API_KEY") as refusal:
        connect(patient(guarded)).post(PATH, [BODY])
    assert "wr0ng" not in str(refusal.value)


@pytest.mark.parametrize("status", [400, 500])
def test_a_key_that_the_server_repeats_is_in_no_message(fake, connect, monkeypatch, status, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    connection = connect(patient(fake, retries=0))
    fake.failures.append((status, {}, f"who is Bearer {KEY}?"))
    with pytest.raises(tq_fast.TqFastError, match=r"who is Bearer \*\*\*\?") as error:
        connection.post(PATH, [BODY])
    assert KEY not in f"{error.value} {error.value!r} {connection!r} {connection.server!r}"
    assert KEY not in caplog.text
