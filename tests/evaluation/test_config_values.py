"""Value heads and the methods that draw whole texts, in a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from tq_fast.errors import InvalidArgument
from tq_fast.evaluation.config import EvalConfig, MethodSpec, ModelSource
from tq_fast.evaluation.config_file import load_config
from tq_fast.evaluation.values import drawing_config, head_folder, place_values

GOOD = """
seeds = [3, 4]
[prompts]
tiny = true
[models]
baseline = "tiny:baseline"
sft = "tiny:sft"
reward = "tiny:reward"
[decode]
max_new_tokens = 24
strategy = "greedy"
stop = "x"
[values.head]
prompts = { tiny_others = 40 }
source = "baseline"
num_texts = 6
epochs = 2
seed = 9
[values.plain]
prompts = { file = "./others.jsonl", chat = true }
max_new_tokens = 12
rounds = 2
alpha = 0.25
models = { reward = "tiny:baseline_reward" }
[[setup]]
name = "one"
method = [
    { method = "value_guided", value = "head", sweep = { alpha = [0.5, 1.0] } },
    { method = "best_of_n", source = "value", value = "plain", n = 4 },
    { method = "refine", source = "value", value = "./heads/mine" },
    { method = "blocks", judge = "rollout" },
    { method = "collab", baselines = ["tiny:baseline", "./other"] },
]
[[setup]]
name = "two"
models = { reward = "tiny:baseline_reward" }
method = [{ method = "value_guided", value = "head" }]
"""


def read(folder: Path, text: str = GOOD) -> EvalConfig:
    path = folder / "config.toml"
    path.write_text(text)
    return load_config(path)


def method(config: EvalConfig, name: str) -> MethodSpec:
    return next(m for m in config.setups[0].methods if m.name == name)


def test_a_head_belongs_to_each_set_up_that_uses_it(tmp_path: Path) -> None:
    config = read(tmp_path)
    heads = {(spec.setup, spec.name): spec for spec in config.values}
    assert list(heads) == [("one", "head"), ("one", "plain"), ("two", "head")]
    first, plain, second = heads.values()
    # It is fitted to the reward of the set-up, unless its table says otherwise.
    assert first.texts.models["reward"] == ModelSource("tiny:reward")
    assert second.texts.models["reward"] == ModelSource("tiny:baseline_reward")
    assert plain.texts.models["reward"] == ModelSource("tiny:baseline_reward")
    assert (first.prompts.kind, first.prompts.limit, first.seed) == ("tiny_others", 40, 9)
    assert (plain.prompts.name, plain.prompts.chat) == (str(tmp_path / "others.jsonl"), True)
    assert dict(plain.fit) == {
        "transfer": "direct",
        "beta": None,
        "rounds": 2,
        "reward_states": False,
        "alpha": 0.25,
        "epochs": 6,
    }


def test_its_texts_are_drawn_by_a_method_of_their_own(tmp_path: Path) -> None:
    config = read(tmp_path)
    first, plain, _ = config.values
    assert (first.texts.method, first.texts.own) == ("best_of_n", {"n": 6, "source": "baseline"})
    assert first.texts.keeps_texts
    # They are plain samples, of the length of the set-up's responses unless the table says more.
    assert first.texts.config(0).max_new_tokens == 24 and first.texts.config(0).stop == ("x",)
    assert first.texts.config(0).strategy == "sample"
    assert plain.texts.config(0).max_new_tokens == 12 and plain.texts.own["source"] == "sft"
    # The model that draws no text is left out, since it would only be measured against.
    assert "sft" not in first.texts.models and "baseline" not in plain.texts.models
    drawing = drawing_config(config, first)
    assert (drawing.seeds, drawing.setups, drawing.values) == ((9,), (first.drawing,), ())


def test_methods_find_their_heads_in_the_output_or_in_a_folder(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert method(config, "value_guided-alpha=0.5").value is None
    placed = place_values(config, tmp_path / "out")
    first, plain, second = config.values
    assert method(placed, "value_guided-alpha=0.5").value == head_folder(tmp_path / "out", first)
    assert method(placed, "best_of_n").value == head_folder(tmp_path / "out", plain)
    assert method(placed, "refine").value == tmp_path / "./heads/mine"
    assert method(placed, "blocks").value is None
    assert placed.setups[1].methods[0].value == head_folder(tmp_path / "out", second)
    assert len({head_folder(tmp_path, spec) for spec in config.values}) == 3


def test_several_baselines_are_models_by_role(tmp_path: Path) -> None:
    collab = method(read(tmp_path), "collab")
    assert collab.models["baseline"] == ModelSource("tiny:baseline")
    assert collab.models["baseline_2"] == ModelSource(str(tmp_path / "./other"))
    assert "baselines" not in collab.own


def test_what_a_method_has_of_its_own_wins_over_what_holds_for_all(tmp_path: Path) -> None:
    refine = method(read(tmp_path), "refine")
    assert "strategy" not in refine.decode and "strategy" not in refine.own
    own = read(tmp_path, GOOD.replace('"./heads/mine"', '"./heads/mine", strategy = "sample"'))
    assert method(own, "refine").own["strategy"] == "sample"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('value = "head", sweep', 'value = "haed", sweep', r"\[values.NAME\] or a folder.*'head'"),
        ('value = "head", sweep', "sweep", "value_guided names no value"),
        ('source = "value", value = "plain"', 'source = "value"', "best_of_n names no value"),
        ('source = "value", value = "plain"', 'value = "plain"', "a value that its source is not"),
        ("num_texts = 6", "numtexts = 6", r"values.head: unknown key 'numtexts'"),
        ("num_texts = 6", "num_texts = 0", r"values.head: num_texts must be an integer"),
        ("epochs = 2", "epochs = 0", r"values.head: epochs must be an integer"),
        ("seed = 9", "seed = 0.5", r"values.head: seed must be an integer"),
        ("max_new_tokens = 12", "max_new_tokens = 0", r"values.plain: max_new_tokens must be"),
        ("rounds = 2", 'rounds = 2\ntransfer = "indirect"', "beta must be given"),
        (
            "rounds = 2",
            'rounds = 2\ntransfer = "indirect"\nbeta = 0.5',
            "weighs texts of the baseline, got source = 'sft'",
        ),
        ('source = "baseline"', 'source = "value"', "source must be 'sft' or 'baseline'"),
        ("prompts = { tiny_others = 40 }", "", "values.head: prompts is missing"),
        ("tiny_others = 40", "tiny_others = true", "tiny_others must be a number of prompts"),
        (
            'baselines = ["tiny:baseline", "./other"]',
            "baselines = []",
            "baselines must be a list of models",
        ),
        ('sft = "tiny:sft"\n', "", "values.plain needs a model as sft; there is none"),
        ('baseline = "tiny:baseline"\n', "", "values.head needs a model as baseline"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    if "needs a model as baseline" in message:
        text = text.replace('    { method = "blocks", judge = "rollout" },\n', "")
    with pytest.raises(InvalidArgument, match=message):
        read(tmp_path, text)


def test_a_head_needs_a_model_to_guide(tmp_path: Path) -> None:
    text = GOOD.replace('sft = "tiny:sft"\n', "").replace('baseline = "tiny:baseline"\n', "")
    text = text[: text.index("[[setup]]")] + (
        '[[setup]]\nname = "one"\nmethod = [{ method = "value_guided", value = "./mine" }]\n'
    )
    with pytest.raises(InvalidArgument, match="value_guided needs a model as sft or baseline"):
        read(tmp_path, text)
