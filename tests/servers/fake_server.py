"""A model server in a thread: what decoding asks for, answered by a model of transformers.

Its answers have the shape of vLLM 0.32's, which tests/servers/test_vllm.py holds the client
against. It fails on request, and can have each setting that the client refuses or warns of.
"""

from __future__ import annotations

import collections
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.truncation import truncate

NAME = "the-model"
METRICS = 'vllm:cache_config_info{block_size="16",enable_prefix_caching="True",engine="0"} 1.0\n'
# What a server takes from the model's files where a request leaves it out.
SAID_BY_MODELS = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "ignore_eos"}


class Refusal(Exception):
    """A status and a sentence to answer with."""


class FakeServer:
    """A server at `url`, on a loopback port, until `close`.

    Attributes:
        failures: one is taken at each POST: a status, (status, headers, message), seconds to wait
            first, "drop" (the connection closes), "mixed" (another request's log-probs), "abort".
        requests: (path, body) of every POST that did not fail on request.
        connections: sockets that were opened.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        root: str = "/nowhere",
        names: tuple[str, ...] = (NAME,),
        logprobs_mode: str = "processed_logprobs",
        max_logprobs: int = 20,
        max_length: int = 128,
        logits_dtype: torch.dtype = torch.float32,
        metrics: str = METRICS,
        key: str | None = None,
        has_switch: bool = True,
        shift_of_scores: int = 0,
        own_stop_ids: tuple[int, ...] = (),
    ) -> None:
        self.model, self.tokenizer, self.root, self.names = model, tokenizer, root, names
        self.logprobs_mode, self.max_logprobs = logprobs_mode, max_logprobs
        self.max_length, self.logits_dtype, self.metrics = max_length, logits_dtype, metrics
        self.key, self.has_switch, self.shift_of_scores = key, has_switch, shift_of_scores
        self.own_stop_ids = own_stop_ids
        self.failures: collections.deque[Any] = collections.deque()
        self.requests: list[tuple[str, Any]] = []
        self.known: dict[tuple[int, ...], torch.Tensor] = {}
        self.connections = self.most_at_once = self.now = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def get(self, path: str) -> Any:
        if path == "/metrics" and self.metrics:
            return self.metrics
        if path != "/v1/models":
            raise Refusal(404, "Not Found")
        length = {"max_model_len": self.max_length}
        return {"data": [{"id": name, "root": self.root, **length} for name in self.names]}

    def post(self, path: str, body: dict[str, Any], failure: Any) -> Any:
        is_classifier = self.model.get_output_embeddings() is None
        if path == "/tokenize" and self.tokenizer is not None:
            special = body["add_special_tokens"]
            return {
                "tokens": self.tokenizer(body["prompt"], add_special_tokens=special)["input_ids"]
            }
        if path == "/classify" and is_classifier:
            return {"data": [self._classify(i, text, body) for i, text in enumerate(body["input"])]}
        if path != "/v1/completions" or is_classifier:
            raise Refusal(404, "Not Found")
        unsaid = SAID_BY_MODELS - body.keys()
        if unsaid:
            raise Refusal(422, f"the model's generation_config.json would say {sorted(unsaid)}")
        vocab_size = self.model.config.vocab_size
        if body.get("logprob_token_ids") is None and body.get("logprobs", 0) > self.max_logprobs:
            raise Refusal(400, f"greater than max allowed: {self.max_logprobs}")
        if any(token >= vocab_size for token in body.get("logprob_token_ids", ())):
            raise Refusal(400, f"out-of-vocab token ids. Vocabulary size: {vocab_size}")
        choices = [
            self._complete(prompt, body, number, failure)
            for prompt in body["prompt"]
            for number in range(body.get("n", 1))
        ]
        # A server is free to answer in any order.
        return {"choices": [{"index": i, **choice} for i, choice in enumerate(choices)][::-1]}

    def logits(self, tokens: list[int]) -> torch.Tensor:
        known = self.known.get(tuple(tokens))
        if known is None:
            with torch.no_grad():
                known = self.model(torch.tensor([tokens])).logits[0].to(self.logits_dtype).float()
            self.known[tuple(tokens)] = known
        return known

    def _complete(self, prompt: list[int], body: Any, number: int, failure: Any) -> dict[str, Any]:
        temperature, tokens = body["temperature"], []
        seed = torch.Generator().manual_seed(body.get("seed", 0) + number)
        named: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        stops, finish = {*body.get("stop_token_ids", ()), *self.own_stop_ids}, "length"
        if not body["ignore_eos"]:
            # Every second id is an end id of the model.
            stops |= set(range(0, self.model.config.vocab_size, 2))
        while len(tokens) < min(body["max_tokens"], self.max_length - len(prompt)):
            logits = self.logits([*prompt, *tokens])[-1]
            own = drawn = logits.log_softmax(0)
            if temperature:
                top_k, top_p = body["top_k"] or len(own), body["top_p"]
                drawn = truncate(logits, temperature, top_k, top_p if top_p < 1 else 2.0)
            token = int(
                torch.multinomial(drawn.exp(), 1, generator=seed) if temperature else own.argmax()
            )
            shown = {"processed_logprobs": drawn, "raw_logprobs": own}.get(
                self.logprobs_mode, logits
            )
            wanted = (
                body.get("logprob_token_ids")
                or shown.topk(body.get("logprobs", 0)).indices.tolist()
            )
            wanted = [0] if failure == "mixed" and "logprob_token_ids" not in body else wanted
            of = {f"token_id:{i}": max(float(shown[i]), -9999.0) for i in (token, *wanted)}
            if failure == "mixed" and wanted == [0]:
                of["token_id:0"] = -9999.0
            tokens.append(token)
            named["tokens"].append(f"token_id:{token}")
            named["token_logprobs"].append(of[f"token_id:{token}"])
            named["top_logprobs"].append(of)
            if token in stops:
                finish = "stop"
                break
        rows = None
        if body.get("prompt_logprobs") is not None:
            law = self.logits(prompt).log_softmax(-1).roll(self.shift_of_scores, 0)
            pairs = enumerate(prompt[1:])
            rows = [None, *({str(t): {"logprob": float(law[i, t])}} for i, t in pairs)]
        finish = "abort" if failure == "abort" else finish
        return {
            "logprobs": named,
            "finish_reason": finish,
            "stop_reason": None,
            "prompt_logprobs": rows,
        }

    def _classify(self, i: int, text: Any, body: Any) -> dict[str, Any]:
        if isinstance(text, str):
            text = self.tokenizer(text)["input_ids"]
        with torch.no_grad():
            hidden = self.model.base_model(torch.tensor([text])).last_hidden_state
            # A server knows no padding: it reads the score at the last token.
            scores = self.model.score(hidden[0, -1])
        if body["use_activation"] or not self.has_switch:
            scores = scores.sigmoid()
        return {"index": i, "probs": scores.tolist()}


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Else every answer waits for an acknowledgement of its headers, 40 ms late.
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            server.connections += 1

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(lambda: server.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                failure = server.failures.popleft() if server.failures else None
                server.now += 1
                server.most_at_once = max(server.most_at_once, server.now)
            try:
                if failure == "drop":
                    self.close_connection = True
                    return
                if isinstance(failure, float):
                    time.sleep(failure)
                if isinstance(failure, (int, tuple)) and not isinstance(failure, bool):
                    given = failure if isinstance(failure, tuple) else (failure,)
                    status, headers, message = [
                        *given,
                        *(None, {}, "as the test asked")[len(given) :],
                    ]
                    self._send(status, {"error": {"message": message}}, headers)
                    return
                # Before the client has the answer, and may look.
                server.requests.append((self.path, body))
                self._answer(lambda: server.post(self.path, body, failure))
            finally:
                with server.lock:
                    server.now -= 1

        def _answer(self, call: Any) -> None:
            authorization = self.headers.get("Authorization")
            if server.key is not None and authorization != f"Bearer {server.key}":
                self._send(401, {"error": {"message": f"{authorization} is wrong"}})
                return
            try:
                self._send(200, call())
            except Refusal as refusal:
                status, message = refusal.args
                self._send(status, {"error": {"message": message}})

        def _send(self, status: int, answer: Any, headers: Any = None) -> None:
            content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": len(content)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(content)

    return Handler
