"""Tasks of lm-evaluation-harness, answered by the embedded models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

import tq_fast
from tests import zoo
from tq_fast.models.tiny import load_tiny_world

pytestmark = pytest.mark.lm_eval

WORLD = load_tiny_world()
PROMPTS = list(WORLD.prompts[:3])
STEERED: dict[str, Any] = {"k": 4, "horizon": 4, "alpha": 0.5}
TASK = """
task: reviews
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{wanted}}}}"
process_results: !function words.count
generation_kwargs:
  until:
    - "."
  max_gen_toks: 12
  do_sample: false
metric_list:
  - metric: num_words
    aggregation: mean
    higher_is_better: true
"""
COUNT = """
def count(doc, results):
    return {"num_words": float(len(results[0].split()))}
"""
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: Any) -> Path:
    """A folder with one task over the prompts."""
    rows = [{"prompt": prompt, "wanted": ""} for prompt in PROMPTS]
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "reviews.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    (tmp_path / "words.py").write_text(COUNT, encoding="utf-8")
    return tmp_path


def evaluate(folder: Path, model_args: dict[str, Any], **options: Any) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import tq_fast.lm_eval  # noqa: F401

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model="tq_fast",
        model_args={"baseline": str(WORLD.baseline), "reward": str(WORLD.reward), **model_args},
        tasks=["reviews"],
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )


def request(prompt: str, **settings: Any) -> Any:
    return SimpleNamespace(args=(prompt, settings))


def model(**options: Any) -> Any:
    from tq_fast.lm_eval import TransferModel

    return TransferModel(
        **{"baseline": WORLD.baseline, "reward": WORLD.reward, **STEERED, **options}
    )


def test_a_task_gets_the_responses_of_decode(task_folder: Path) -> None:
    found = evaluate(task_folder, {**STEERED, "sft": str(WORLD.sft)}, log_samples=True)
    expected = tq_fast.decode(
        PROMPTS,
        WORLD.baseline,
        WORLD.reward,
        sft=WORLD.sft,
        strategy="greedy",
        stop=["."],
        max_new_tokens=12,
        **STEERED,
    )
    samples = sorted(found["samples"]["reviews"], key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == expected.texts
    words = [len(text.split()) for text in expected.texts]
    assert found["results"]["reviews"]["num_words,none"] == pytest.approx(sum(words) / 3)
    said = found["config"]
    divergences = [certificate.kl_to_sft for certificate in expected.certificates]
    assert said["kl_to_sft"] == pytest.approx(sum(divergences) / 3)
    assert said["tq_fast_method"] == "transfer_q" and said["kl_kind"] == "at most"


def test_the_command_runs_a_task(task_folder: Path) -> None:
    arguments = f"baseline={WORLD.baseline},reward={WORLD.reward},method=best_of_n,n=2"
    command = [sys.executable, "-m", "tq_fast.lm_eval", "run", "--model", "tq_fast"]
    command += ["--model_args", arguments, "--tasks", "reviews", "--batch_size", "2"]
    command += ["--include_path", str(task_folder), "--output_path", str(task_folder / "out.json")]
    answer = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert answer.returncode == 0, answer.stderr
    (path,) = task_folder.glob("out*.json")
    saved = json.loads(path.read_text(encoding="utf-8"))
    expected = tq_fast.presets.best_of_n(
        PROMPTS, WORLD.baseline, WORLD.reward, n=2, stop=".", max_new_tokens=12
    )
    words = [len(text.split()) for text in expected.texts]
    assert saved["results"]["reviews"]["num_words,none"] == pytest.approx(sum(words) / 3)


def test_requests_of_different_settings_are_answered_in_their_order() -> None:
    requests = [
        request(PROMPTS[0], until=["."], max_gen_toks=8),
        request(PROMPTS[1], until=[], max_gen_toks=5),
        request(PROMPTS[2], until=["."], max_gen_toks=8),
    ]
    answers = model().generate_until(requests)
    decoder = tq_fast.TransferDecoder(WORLD.baseline, WORLD.reward)
    given = {"strategy": "greedy", **STEERED}
    first = decoder.decode([PROMPTS[0], PROMPTS[2]], stop=".", max_new_tokens=8, **given)
    other = decoder.decode(PROMPTS[1], max_new_tokens=5, **given)
    assert answers == [first.texts[0], other.texts[0], first.texts[1]]


def test_sampling_is_that_of_the_request_or_of_the_model_args() -> None:
    asked = request(PROMPTS[0], max_gen_toks=6, do_sample=True, temperature=1.0, top_p=1.0)
    decoder = tq_fast.TransferDecoder(WORLD.baseline, WORLD.reward)
    sampled = decoder.decode(PROMPTS[0], max_new_tokens=6, seed=3, **STEERED).texts
    assert model(seed=3).generate_until([asked]) == sampled
    greedy = request(PROMPTS[0], max_gen_toks=6, do_sample=False)
    assert model(seed=3, strategy="sample").generate_until([greedy]) == sampled
    cooler = request(PROMPTS[0], max_gen_toks=6, do_sample=True, temperature=0.5)
    expected = tq_fast.presets.baseline(
        PROMPTS[0], WORLD.baseline, max_new_tokens=6, rollout_temperature=0.5
    )
    plain = model(method="baseline", k=10, horizon=20, alpha=1.0)
    assert plain.generate_until([cooler]) == expected.texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "temperature=0.7 is no setting of the method"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 5}, "--gen_kwargs top_k=0"),
        ({"num_beams": 4}, "gen_kwargs: num_beams=4 is not read"),
        ({"max_gen_toks": 100_000}, "allows"),
    ],
)
def test_what_a_request_asks_in_vain_is_refused(settings: Any, message: str) -> None:
    with pytest.raises(tq_fast.InvalidArgument, match=message):
        model().generate_until([request(PROMPTS[0], **settings)])


def test_log_likelihoods_are_refused_by_a_sentence() -> None:
    opened = model()
    for call in (opened.loglikelihood, opened.loglikelihood_rolling):
        with pytest.raises(tq_fast.InvalidArgument, match="'generate_until' alone"):
            call([request(PROMPTS[0])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size must be an integer"),
        ({"max_batch_size": 4}, "max_batch_size must be None"),
        ({"metod": "args"}, "unknown option 'metod'"),
        ({"num_return_sequences": 2}, "num_return_sequences must be 1, got 2"),
        (
            {"baseline": zoo.language_model("llama"), "reward": lambda prompts, texts: [0.0]},
            "tokenizer must be given, got None",
        ),
    ],
)
def test_wrong_model_args_are_refused(options: Any, message: str) -> None:
    with pytest.raises(tq_fast.InvalidArgument, match=message):
        model(**options)


def test_the_device_that_the_command_names_by_itself_may_be_missing(monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    opened = model(device="cuda:0")
    assert opened.opened.session.languages["baseline"].device.type == "cpu"
    with pytest.raises(tq_fast.InvalidArgument, match="device 'cuda:1' cannot be used"):
        model(device="cuda:1")


def test_chats_are_rendered_by_the_tokenizers_template(task_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(WORLD.baseline)
    tokenizer.chat_template = None
    plain = model(tokenizer=tokenizer)
    with pytest.raises(tq_fast.InvalidArgument, match="needs a chat template"):
        plain.apply_chat_template([{"role": "user", "content": "Hello"}])
    tokenizer.chat_template = TEMPLATE
    opened = model(tokenizer=tokenizer)
    chat = [{"role": "user", "content": PROMPTS[0]}]
    assert opened.apply_chat_template(chat) == f"<user> {PROMPTS[0]}\n<assistant>"
    assert opened.chat_template(True) == TEMPLATE
    with pytest.raises(tq_fast.InvalidArgument, match="apply_chat_template must be True"):
        opened.chat_template("tool_use")
    tokenizer.save_pretrained(task_folder / "tokenizer")
    found = evaluate(
        task_folder,
        {**STEERED, "tokenizer": str(task_folder / "tokenizer")},
        apply_chat_template=True,
        log_samples=True,
    )
    rendered = found["samples"]["reviews"][0]["arguments"][0][0]
    assert rendered.startswith("<user> ") and rendered.endswith("\n<assistant>")
