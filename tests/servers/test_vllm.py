"""vLLM 0.32 itself, on CPU and the loopback, with the embedded models: `make engine-test`.

Every operation is compared with transformers in fp32. Log-probs differ by rounding: 4e-6 was
measured, of numbers up to 20. The tests need the server in TEST_VLLM or build/vllm/bin/vllm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

import tq_fast
from tests.ops.statistics import chi_square_excess
from tests.truncation import truncate
from tq_fast import UnsupportedModel
from tq_fast.servers.checks import open_language_server, open_reward_server
from tq_fast.servers.operations import LanguageServer, RolloutRequest, SamplingLaw

REPOSITORY = Path(__file__).parents[2]
VLLM = Path(os.environ.get("TEST_VLLM", REPOSITORY / "build" / "vllm" / "bin" / "vllm")).absolute()
WEIGHTS = Path(tq_fast.__file__).parent / "models" / "tiny" / "weights"
# A server takes a minute to start on two cores; the tests of retries start one anew.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    # Whoever names one wants it tried.
    pytest.mark.skipif(
        "TEST_VLLM" not in os.environ and not VLLM.exists(),
        reason=f"no vLLM at {VLLM}: make engine-test",
    ),
]
# vLLM computes attention and sums in other orders than transformers.
NEAR = 5e-5
GREEDY, WARM, CUT = SamplingLaw(0.0), SamplingLaw(0.7), SamplingLaw(1.3, 12, 0.8)
END = (2,)
# With chunked prefill, vLLM on CPU ends at the first seeded request whose prompt is cut in two.
LANGUAGE = (
    "--enable-prefix-caching --block-size 32 --dtype float32 --max-logprobs 20 --logprobs-mode "
    "processed_logprobs --no-enable-chunked-prefill --max-num-batched-tokens 4096"
)
CLASSIFIER = "--runner pooling --convert classify --dtype float32"
PROMPTS = ["the old cat", "a small bird sat", "the dog"]
DECODE = {"max_new_tokens": 8, "k": 4, "horizon": 4, "alpha": 0.2}
DECODE |= {"rollout": "greedy", "strategy": "greedy"}


class Vllm:
    """A vLLM server in processes of its own."""

    def __init__(self, model: Path, options: str, log: Path, cores: str = "auto") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.command = [str(VLLM), "serve", str(model), "--host", "127.0.0.1"]
        self.command += ["--port", str(self.port), "--enforce-eager", *options.split()]
        self.log = log
        self.cores = cores

    def start(self) -> None:
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        own["VLLM_CPU_OMP_THREADS_BIND"] = self.cores
        path = f"{VLLM.parent}:{os.environ['PATH']}"
        environment = {**os.environ, **own, "PATH": path}
        # What a checkout puts before the packages is not meant for the server.
        environment.pop("PYTHONPATH", None)
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(f"{self.url}/models").is_success:
                    return
            time.sleep(1)
        raise AssertionError(f"no answer in time: {self.log.read_text()[-3000:]}")

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running(
    model: str, options: str, tmp: pytest.TempPathFactory, cores: str = "auto"
) -> Iterator[Vllm]:
    server = Vllm(WEIGHTS / model, options, tmp.mktemp("vllm") / "log", cores)
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    with running("baseline", LANGUAGE, tmp_path_factory) as started:
        yield started


@pytest.fixture(scope="module")
def reward_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    with running("reward", CLASSIFIER, tmp_path_factory) as started:
        yield started


@pytest.fixture
def language(server: Vllm) -> Iterator[LanguageServer]:
    # A restart takes longer than the default patience where two cores do all the work.
    named = tq_fast.Server(server.url, retries=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_language_server(named, k=10, law=CUT, end_ids=END, needs_scores=True)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(WEIGHTS / "baseline").eval()


def prefixes() -> list[list[int]]:
    """Token ids on both sides of the ends of blocks of 32."""
    generator = torch.Generator().manual_seed(20405495)
    lengths = (1, 5, 31, 32, 33, 64, 65, 100)
    return [[1, *torch.randint(4, 884, (n,), generator=generator).tolist()] for n in lengths]


def laws_after(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def test_what_the_server_says_of_itself_is_found(language):
    assert (language.vocab_size, language.num_ids, language.max_length) == (884, 884, 512)
    assert language.num_logprobs == 20
    assert len(language.tokenizer) == 884


@pytest.mark.parametrize("without", [(), END])
def test_candidates_are_those_of_transformers(language, model, without):
    # The second time, the prefixes come from the server's cache.
    for _ in range(2):
        ids, logprobs = language.candidates(prefixes(), 10, without=without)
        for prefix, row, of_row in zip(prefixes(), ids, logprobs, strict=True):
            law = laws_after(model, prefix)[-1]
            order = law.argsort(descending=True, stable=True).tolist()
            assert row == [token for token in order if token not in without][:10]
            assert of_row == pytest.approx(law[row].tolist(), abs=NEAR)


def test_the_prior_is_that_of_transformers(language, model):
    ids = [[(7 * i + 31 * j) % 884 for j in range(150)] for i in range(len(prefixes()))]
    for prefix, row, of_row in zip(prefixes(), ids, language.prior(prefixes(), ids), strict=True):
        assert of_row == pytest.approx(laws_after(model, prefix)[-1][row].tolist(), abs=NEAR)


def test_greedy_roll_outs_are_those_of_transformers(language, model):
    requests = [
        RolloutRequest([*prefix, token], 20 + token % 2, seed=0)
        for prefix in prefixes()
        for token in (5, 8, 300)
    ]
    drawn = [one for (one,) in language.rollouts(requests, GREEDY, END)]
    assert {one.finish for one in drawn} == {"stop", "length"}
    for request, one in zip(requests, drawn, strict=True):
        laws = laws_after(model, [*request.prefix, *one.tokens])[len(request.prefix) - 1 : -1]
        assert one.tokens == laws.argmax(-1).tolist()
        assert one.logprobs == pytest.approx(laws.max(-1).values.tolist(), abs=NEAR)
        if one.finish == "stop":
            assert one.tokens[-1] in END
        else:
            assert len(one.tokens) == request.max_tokens
        assert not set(one.tokens[:-1]) & set(END)


def test_an_end_id_of_the_model_ends_nothing_unless_it_is_asked_to(language):
    requests = [RolloutRequest([*prefix, 5], 40, seed=0) for prefix in prefixes()]
    drawn = [one for (one,) in language.rollouts(requests, GREEDY, ())]
    assert {len(one.tokens) for one in drawn} == {40}
    assert any(set(one.tokens) & set(END) for one in drawn)


@pytest.mark.parametrize("law", [SamplingLaw(), WARM, CUT], ids=str)
def test_sampled_roll_outs_follow_the_law(language, model, law):
    for place, prefix in enumerate(prefixes()[1:3]):
        ((*drawn,),) = language.rollouts([RolloutRequest(prefix, 1, 10**6 * place, 3000)], law, ())
        logits = laws_after(model, prefix)[-1]
        expected = truncate(
            logits, law.temperature, law.top_k or 884, law.top_p if law.top_p < 1 else 2.0
        )
        tokens = torch.tensor([one.tokens[0] for one in drawn])
        assert chi_square_excess(tokens, expected.exp()) < 10
        logprobs = [one.logprobs[0] for one in drawn]
        assert logprobs == pytest.approx(expected[tokens].tolist(), abs=NEAR)


@pytest.mark.parametrize("law", [SamplingLaw(), CUT], ids=str)
def test_log_probs_of_roll_outs_are_those_of_the_law_drawn_from(language, model, law):
    requests = [RolloutRequest(prefix, 20, 1000 * i, 4) for i, prefix in enumerate(prefixes())]
    for request, row in zip(requests, language.rollouts(requests, law, END), strict=True):
        for one in row:
            laws = laws_after(model, [*request.prefix, *one.tokens])[len(request.prefix) - 1 :]
            for token, logprob, own in zip(one.tokens, one.logprobs, laws, strict=False):
                top_p = law.top_p if law.top_p < 1 else 2.0
                drawn_from = truncate(own, law.temperature, law.top_k or 884, top_p)
                assert logprob == pytest.approx(float(drawn_from[token]), abs=NEAR)


def test_a_roll_out_is_the_same_alone_as_among_others(language):
    requests = [
        RolloutRequest(prefix, 20, 2**63 + 99 * i, 4) for i, prefix in enumerate(prefixes())
    ]
    for request, row in zip(requests, language.rollouts(requests, WARM, END), strict=True):
        alone = RolloutRequest(request.prefix, 20, request.seed + 3)
        ((one,),) = language.rollouts([alone], WARM, END)
        assert one.tokens == row[3].tokens


def test_scores_are_those_of_transformers(language, model):
    continuations = [[5 + i, 300, 7, 2][: i % 4 + 1] for i in range(len(prefixes()))]
    expected = []
    for prefix, continuation in zip(prefixes(), continuations, strict=True):
        laws = laws_after(model, [*prefix, *continuation])[len(prefix) - 1 : -1]
        expected.append(float(laws.gather(1, torch.tensor(continuation)[:, None]).sum()))
    # The second time, the prefixes lie in the server's cache, whose rows have no log-probs.
    for _ in range(2):
        language.candidates(prefixes(), 10)
        assert language.score(prefixes(), continuations) == pytest.approx(expected, abs=NEAR)


def test_candidates_stay_right_beside_another_client_that_names_ids(language):
    expected = language.candidates(prefixes() * 4, 10)
    other = open_language_server(language.connection.server, k=10, law=GREEDY)
    is_done = threading.Event()

    def disturb() -> None:
        while not is_done.is_set():
            other.prior(prefixes() * 4, [[5, 6, 7]] * 4 * len(prefixes()))

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(10):
            assert language.candidates(prefixes() * 4, 10).ids == expected.ids
    finally:
        is_done.set()
        thread.join()
        other.close()


def test_a_server_that_is_killed_and_started_again_loses_no_request(server, language):
    batches = [
        [RolloutRequest([*prefix, 5 + i], 20, 1000 * i, 2) for prefix in prefixes()]
        for i in range(12)
    ]
    expected = [language.rollouts(batch, WARM, END) for batch in batches]
    found, is_begun = [], threading.Event()

    def work() -> None:
        for batch in batches:
            found.append(language.rollouts(batch, WARM, END))
            is_begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert is_begun.wait(60)
    server.kill()
    assert len(found) < len(batches)
    server.start()
    server.wait()
    thread.join()
    tokens = [[[one.tokens for one in row] for row in batch] for batch in found]
    assert tokens == [[[one.tokens for one in row] for row in batch] for batch in expected]


def test_rewards_are_those_of_transformers(reward_server):
    model = AutoModelForSequenceClassification.from_pretrained(WEIGHTS / "reward").eval()
    reward = open_reward_server(tq_fast.Server(reward_server.url))
    texts = ["the old dog sleeps", "a cat", "it rains on Sundays"]
    ids = [reward.tokenizer(text)["input_ids"] for text in texts] + prefixes()
    with torch.no_grad():
        expected = [float(model(torch.tensor([row])).logits) for row in ids]
    assert reward.rewards([*texts, *prefixes()]) == pytest.approx(expected, abs=NEAR)
    with pytest.raises(UnsupportedModel, match="the server completes no texts"):
        open_language_server(tq_fast.Server(reward_server.url), k=3, law=GREEDY)
    reward.close()


@pytest.fixture(scope="module")
def of_the_forest() -> tq_fast.DecodeResult:
    """What the models of this process decode."""
    models = {role: str(WEIGHTS / role) for role in ("baseline", "reward")}
    return tq_fast.decode(PROMPTS, **models, **DECODE, dtype=torch.float32)


def tokens_of(result):
    return [ids.tolist() for ids in result.sequences]


def test_a_decode_gives_the_tokens_of_the_forest(server, reward_server, of_the_forest):
    ours = tq_fast.decode(PROMPTS, server.url, reward_server.url, **DECODE)
    assert tokens_of(ours) == tokens_of(of_the_forest)
    for trace, other in zip(ours.traces, of_the_forest.traces, strict=True):
        for step, expected in zip(trace, other, strict=True):
            assert step.candidates.tolist() == expected.candidates.tolist()
            torch.testing.assert_close(step.q, expected.q, rtol=0, atol=NEAR, equal_nan=True)


def test_a_decode_whose_server_is_killed_and_started_again_gives_the_same_tokens(
    server, reward_server, of_the_forest
):
    # A restart takes longer than the default patience where two cores do all the work.
    patient = tq_fast.Server(server.url, retries=30)
    decoder = tq_fast.TransferDecoder(patient, reward_server.url)
    is_begun, found = threading.Event(), []

    def work() -> None:
        found.append(decoder.decode(PROMPTS, **DECODE, on_token=lambda idx: is_begun.set()))

    thread = threading.Thread(target=work)
    thread.start()
    assert is_begun.wait(120)
    server.kill()
    assert not found
    server.start()
    server.wait()
    thread.join()
    assert tokens_of(found[0]) == tokens_of(of_the_forest)


def test_two_workers_of_a_tensor_parallel_model_give_its_candidates(tmp_path_factory, model):
    cores = sorted(os.sched_getaffinity(0))
    # One core for both is slow and right; vLLM gives each worker those of one field.
    first, second = cores[0], cores[min(1, len(cores) - 1)]
    options = f"{LANGUAGE} --tensor-parallel-size 2"
    with running("baseline", options, tmp_path_factory, f"{first}|{second}") as at:
        opened = open_language_server(tq_fast.Server(at.url), k=10, law=GREEDY, end_ids=END)
        ids, logprobs = opened.candidates(prefixes(), 10)
        for prefix, row, of_row in zip(prefixes(), ids, logprobs, strict=True):
            law = laws_after(model, prefix)[-1]
            assert row == law.argsort(descending=True, stable=True)[:10].tolist()
            assert of_row == pytest.approx(law[row].tolist(), abs=NEAR)
        # The weights did lie in two processes.
        assert "world_size=2" in at.log.read_text()
        opened.close()


def test_settings_that_do_not_serve_are_refused_and_warned_of(tmp_path_factory):
    # In bf16, vLLM's worker dies at its first request on processors whose AMX is out of reach.
    options = (
        "--no-enable-prefix-caching --block-size 64 --dtype float16 --max-logprobs 8 "
        "--logprobs-mode raw_logprobs"
    )
    with running("baseline", options, tmp_path_factory) as at:
        named = tq_fast.Server(at.url)
        with pytest.raises(UnsupportedModel, match="--logprobs-mode processed_logprobs"):
            open_language_server(named, k=5, law=WARM, end_ids=END)
        with pytest.raises(UnsupportedModel, match="--max-logprobs 30"):
            open_language_server(named, k=9, law=GREEDY, end_ids=END)
        with pytest.raises(UnsupportedModel, match="no /classify"):
            open_reward_server(named)
        with pytest.warns(UserWarning) as said:
            open_language_server(named, k=5, law=GREEDY, end_ids=END).close()
        sentences = " ".join(str(warning.message) for warning in said)
        for words in ("half precision", "--enable-prefix-caching", "blocks of 64 tokens"):
            assert words in sentences
