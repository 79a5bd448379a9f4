"""`Server`: how a caller names a model that stands behind a URL."""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from ..config import require_int, require_positive
from ..errors import InvalidArgument


@dataclasses.dataclass(frozen=True)
class Server:
    """A model that a server with the OpenAI API serves, as `vllm serve` does.

    The key that the server may ask for is read from the environment when the server is opened, and
    is part of no message, record or repr. By default this is VLLM_API_KEY, the variable that vLLM's
    server itself reads; it is never OPENAI_API_KEY unless asked for, because a key of another
    service must not be sent to any server whose URL is tried.

    Attributes:
        url: where the API begins, such as "http://127.0.0.1:8000/v1".
        model: the name under which the server serves the model; None: the only one that it serves.
        tokenizer: a hub id, a folder or a tokenizer of transformers; None: the one in the folder
            that the server says the model comes from, where this machine has it, too.
        timeout: seconds that one request may take, the time in the server's queue included.
        connect_timeout: seconds that connecting may take.
        retries: how often a request is sent again after 429, 5xx, a time-out or a lost connection.
        backoff: seconds before the first retry; each one after it waits twice as long, at most 30
            seconds, or as long as the server asks for by Retry-After.
        max_concurrent: requests on their way at a time, at most.
        api_key_env: the environment variable that holds the key.

    Raises:
        InvalidArgument: a value is out of its range; the message names field and value.
    """

    url: str
    model: str | None = dataclasses.field(default=None, kw_only=True)
    tokenizer: Any = dataclasses.field(default=None, kw_only=True)
    timeout: float = dataclasses.field(default=300.0, kw_only=True)
    connect_timeout: float = dataclasses.field(default=10.0, kw_only=True)
    retries: int = dataclasses.field(default=12, kw_only=True)
    backoff: float = dataclasses.field(default=0.5, kw_only=True)
    max_concurrent: int = dataclasses.field(default=64, kw_only=True)
    api_key_env: str = dataclasses.field(default="VLLM_API_KEY", kw_only=True)

    def __post_init__(self) -> None:
        self._check_url()
        if self.model is not None and not (isinstance(self.model, str) and self.model):
            raise InvalidArgument(
                f"model must be a name that is not empty or None, got {self.model!r}"
            )
        for name in ("timeout", "connect_timeout", "backoff"):
            require_positive(name, getattr(self, name))
        require_int("retries", self.retries, low=0)
        require_int("max_concurrent", self.max_concurrent, low=1)
        name = self.api_key_env
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            # The value is not shown: it may be the key itself.
            raise InvalidArgument(
                "api_key_env must be the name of an environment variable, not the key itself"
            )

    @property
    def root(self) -> str:
        """The URL without the "/v1" at its end: below it lie the paths outside of OpenAI's API."""
        return self.url.rstrip("/").removesuffix("/v1")

    def read_api_key(self) -> str | None:
        """Return the key, None where the variable is unset or empty."""
        return os.environ.get(self.api_key_env) or None

    @staticmethod
    def named(source: Any, options: Mapping[str, Any] | None = None) -> Server | None:
        """Return the server that `source` is, or is the URL of; None where it is neither.

        Raises:
            InvalidArgument: `options`, the fields of a server that is named by its URL, are wrong.
        """
        if isinstance(source, Server):
            return source
        if not isinstance(source, str) or not source.startswith(("http://", "https://")):
            return None
        known = {field.name for field in dataclasses.fields(Server)} - {"url"}
        for name in options or {}:
            if name not in known:
                raise InvalidArgument(
                    f"model_kwargs: {name!r} is no field of a server; expected one of "
                    f"{', '.join(sorted(known))}"
                )
        return Server(source, **(options or {}))

    def _check_url(self) -> None:
        try:
            parts = urllib.parse.urlsplit(self.url)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port
        except (TypeError, ValueError, AttributeError):
            is_url = False
        if not isinstance(self.url, str) or not is_url:
            raise InvalidArgument(
                f"url must be an address such as 'http://127.0.0.1:8000/v1', got {self.url!r}"
            )
        if parts.username is not None or parts.query or parts.fragment:
            # The value is not shown: a password or a token may stand in it.
            raise InvalidArgument(
                "url must have no user, password, query or fragment; a key is read from the "
                "environment variable that api_key_env names"
            )
