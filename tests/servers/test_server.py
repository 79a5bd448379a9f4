"""`Server`, what a caller says of a model behind a URL."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

import tq_fast
from tq_fast import InvalidArgument, Server

URL = "http://127.0.0.1:8000/v1"


def test_a_server_is_public_and_frozen_and_can_be_sent_to_another_process():
    server = Server(URL, model="llama")
    assert tq_fast.Server is Server
    assert pickle.loads(pickle.dumps(server)) == server
    with pytest.raises(dataclasses.FrozenInstanceError):
        server.model = "other"


@pytest.mark.parametrize("url", ["http://host:8000/v1", "http://host:8000/v1/", "http://host:8000"])
def test_the_root_of_a_url_is_what_stands_before_the_version(url):
    assert Server(url).root == "http://host:8000"


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://host", "http://", "http://h:x", None, 3]
)
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InvalidArgument, match=r"^url must be an address such as"):
        Server(url)


@pytest.mark.parametrize("url", ["http://me:s3cret@host/v1", "http://host/v1?key=s3cret"])
def test_a_secret_in_a_url_is_refused_and_not_shown(url):
    with pytest.raises(InvalidArgument, match="no user, password, query") as refusal:
        Server(url)
    assert "s3cret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("model", 3),
        ("timeout", 0),
        ("timeout", float("inf")),
        ("connect_timeout", -1.0),
        ("backoff", None),
        ("retries", -1),
        ("retries", 1.5),
        ("max_concurrent", 0),
    ],
)
def test_a_wrong_value_is_named(field, value):
    with pytest.raises(InvalidArgument, match=rf"^{field} must be .*, got {value!r}$"):
        Server(URL, **{field: value})


def test_a_key_in_place_of_its_variable_is_refused_and_not_shown():
    with pytest.raises(InvalidArgument, match=r"^api_key_env must be the name") as refusal:
        Server(URL, api_key_env="sk-s3cret")
    assert "s3cret" not in str(refusal.value)


def test_the_key_is_read_from_the_environment_and_is_no_part_of_the_server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-service")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    server = Server(URL)
    assert server.read_api_key() is None
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    assert server.read_api_key() == "s3cret"
    assert "s3cret" not in f"{server!r} {server} {dataclasses.asdict(server)} {vars(server)}"
    assert Server(URL, api_key_env="OPENAI_API_KEY").read_api_key() == "of-another-service"
