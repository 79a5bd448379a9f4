"""The configuration of an evaluation: what it means, and what is refused before any model."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tq_fast.errors import InvalidArgument
from tq_fast.evaluation.config import EvalConfig, ModelSource
from tq_fast.evaluation.config_file import find_config, load_config, recipe_files
from tq_fast.evaluation.prompts import check_readable

GOOD = """
seeds = [3, 4]
batch_size = 2
[prompts]
tiny = true
limit = 5
[models]
baseline = "tiny:baseline"
sft = "tiny:sft"
reward = "tiny:reward"
[decode]
k = 3
horizon = "none"
prior = "baseline"
[[setup]]
name = "one"
compare_with = ["plain"]
models = { gold = "tiny:gold_reward" }
decode = { alpha = 0.5 }
method = [
    { method = "baseline", name = "plain" },
    { method = "transfer_q", alpha = 0.25 },
    { method = "args", prior = "sft", label = "ARGS" },
    { method = "best_of_n", source = "sft", sweep = { n = [2, 4] } },
    { method = "transfer_q", name = "other", models = { reward = { name = "./r", keep = 0.5 } } },
]
"""


def read(folder: Path, text: str) -> EvalConfig:
    path = folder / "config.toml"
    path.write_text(text)
    return load_config(path)


def method(config: EvalConfig, name: str) -> Any:
    return next(m for m in config.setups[0].methods if m.name == name)


def test_the_innermost_table_wins(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD)
    assert (config.seeds, config.batch_size, config.workers) == ((3, 4), 2, 1)
    assert config.prompts.limit == 5
    decode = method(config, "transfer_q").config(seed=3)
    assert (decode.k, decode.horizon, decode.alpha, decode.seed) == (3, None, 0.25, 3)
    assert decode.prior == "baseline"
    assert method(config, "plain").config(0).alpha == 0.5
    assert method(config, "plain").models["gold"] == ModelSource("tiny:gold_reward")
    own = method(config, "other").models["reward"]
    assert own == ModelSource(str(tmp_path / "./r"), 0.5)
    assert config.setups[0].models["reward"] == ModelSource("tiny:reward")


def test_what_a_method_fixes_wins_over_what_holds_for_all(tmp_path: Path) -> None:
    args = method(read(tmp_path, GOOD), "args")
    assert "horizon" not in args.decode and args.own == {"prior": "sft"}
    assert args.label == "ARGS"


def test_a_ceiling_is_a_pool_of_plain_sft_samples(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD).setups[0].pool is None
    more = GOOD.replace("seeds", "ceiling = 64\nseeds").replace(
        "[decode]", "[decode]\nmin_new_tokens = 3\nrollout_temperature = 0.5\nmax_new_tokens = 9"
    )
    config = read(tmp_path, more)
    (setup,) = config.setups
    assert setup.jobs == (*setup.methods, setup.pool)
    assert setup.pool.is_pool and not setup.methods[0].is_pool
    decode = setup.pool.config(0)
    # The law is that which divergences are measured against, whatever the methods do.
    assert (decode.num_return_sequences, decode.max_new_tokens) == (64, 9)
    assert (decode.min_new_tokens, decode.rollout_temperature, decode.strategy) == (
        0,
        1.0,
        "sample",
    )
    (seed,) = setup.pool.seeds(config.seeds)
    assert seed not in config.seeds and setup.methods[0].seeds(config.seeds) == (3, 4)
    # That of a set-up wins over that of the whole.
    assert read(tmp_path, more.replace('"one"', '"one"\nceiling = 0')).setups[0].pool is None
    own = read(tmp_path, GOOD.replace('"one"', '"one"\nceiling = 8')).setups[0]
    assert own.pool.num_texts == 8


@pytest.mark.parametrize("value", ["1", "-2", "true", "2.0", '"64"'])
def test_a_ceiling_of_no_samples_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(InvalidArgument, match=r"ceiling must be a number of SFT samples"):
        read(tmp_path, f"ceiling = {value}\n{GOOD}")


def test_a_ceiling_needs_an_sft_model(tmp_path: Path) -> None:
    text = "ceiling = 8\n" + GOOD.replace('sft = "tiny:sft"\n', "").replace(
        '    { method = "args", prior = "sft", label = "ARGS" },\n', ""
    ).replace('source = "sft", ', "")
    with pytest.raises(InvalidArgument, match=r"\(one\): ceiling needs a model as sft"):
        read(tmp_path, text)


def test_a_sweep_is_one_method_a_value(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD)
    swept = [m for m in config.setups[0].methods if m.swept]
    assert [m.name for m in swept] == ["best_of_n-n=2", "best_of_n-n=4"]
    assert [m.own["n"] for m in swept] == [2, 4]
    assert swept[0].swept == ("n", 2.0) and swept[0].group == "best_of_n"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_size = 2", "batchsize = 2", "unknown key 'batchsize'; did you mean 'batch_size'"),
        ("batch_size = 2", "batch_size = 0", "batch_size must be an integer of at least 1, got 0"),
        ("seeds = [3, 4]", "seeds = [3, 3]", "seeds must be different integers"),
        ("seeds = [3, 4]", "seeds = []", "seeds must be different integers"),
        ("k = 3", "kk = 3", "decode: unknown key 'kk'; did you mean 'k'"),
        ("k = 3", "k = 0", "k must be an integer of at least 1, got 0"),
        ("k = 3", "seed = 3", "decode: unknown key 'seed'"),
        ("alpha = 0.25", "alhpa = 0.25", r"unknown key 'alhpa'; did you mean 'alpha'"),
        ("alpha = 0.25", 'transfer = "indirect"', "transfer_q fixes transfer = 'direct'"),
        ('"transfer_q", alpha', '"transfer_w", alpha', "did you mean 'transfer_q'"),
        ('name = "plain" ', 'name = "pl/ain" ', "name must consist of letters, digits"),
        ('name = "plain" ', 'name = "other" ', "the name 'other' stands there twice"),
        ('["plain"]', '["plane"]', "compare_with names no method: 'plane'; did you mean 'plain'"),
        (
            "tiny = true",
            'tiny = true\nfile = "x"',
            "one of tiny, tiny_others, file, dataset, got 'tiny', 'file'",
        ),
        ("limit = 5", "limit = 0", "limit must be an integer of at least 1, got 0"),
        ("limit = 5", 'split = "x"', "split must be text, beside dataset"),
        ("{ n = [2, 4] }", "{ n = [] }", "sweep must be one setting and its numbers"),
        ("{ n = [2, 4] }", "{ m = [2] }", "sweep: unknown key 'm'"),
        ("keep = 0.5", "keep = 0", r"keep must be in \(0, 1\], got 0"),
        ('sft = "tiny:sft"', "", "args needs a model as sft; there is none"),
        ('reward = "tiny:reward"', "", "models must name a reward, the target"),
        ("[[setup]]", "[setup]", "must be a list of at least one table"),
        ("seeds = [3, 4]", "seeds = [3, 4", "is not TOML"),
        ('sft = "tiny:sft"', 'sfr = "tiny:sft"', "unknown key 'sfr'; did you mean 'sft'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(InvalidArgument, match=message):
        read(tmp_path, GOOD.replace(old, new, 1))


def test_indirect_transfer_needs_what_its_weights_need(tmp_path: Path) -> None:
    text = GOOD.replace('"transfer_q", alpha', '"transfer_q_indirect", beta = 0.5, alpha')
    assert read(tmp_path, text)
    gap = text.replace("alpha = 0.25", 'alpha = 0.25, weights = "reward_gap"')
    with pytest.raises(InvalidArgument, match="needs a model as baseline_reward"):
        read(tmp_path, gap)


def test_a_file_that_is_not_there_is_named_with_the_nearest_recipe(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"neither a file nor.*did you mean 'tiny'"):
        find_config("tinny")
    assert find_config("tiny").name == "tiny.toml"
    with pytest.raises(InvalidArgument, match="cannot be read"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_whether_it_was_run(path: Path) -> None:
    config = load_config(path)
    assert config.setups and config.title
    first = config.text.splitlines()[0]
    is_embedded = path.stem.startswith(("tiny", "frontier"))
    is_run = is_embedded or path.stem == "real"
    assert is_run != first.startswith("# NOT RUN HERE")
    for setup in config.setups:
        names = [str(source) for source in setup.models.values()]
        assert any(name.startswith("tiny:") for name in names) == is_embedded


def test_a_data_set_without_its_library_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read(tmp_path, GOOD.replace("tiny = true", 'dataset = "org/prompts"'))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match="needs the `datasets` library"):
        check_readable(config.prompts)


class _DataSet:
    """Stands for a data set of the library `datasets`, as far as it is used."""

    column_names = ("prompt", "chosen")

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        assert column == "prompt"
        return self.rows

    def select(self, indices: range) -> _DataSet:
        return _DataSet([self.rows[i] for i in indices])


def test_prompts_of_a_data_set_are_its_first_texts_without_its_own_dialogue_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = 'dataset = "org/prompts"\nremove = ["Human: ", "Assistant:"]'
    prompts = read(tmp_path, GOOD.replace("tiny = true", source).replace("5", "2")).prompts
    rows = ["Human: a Assistant:", [{"role": "user", "content": "b"}], "c"]
    library = types.SimpleNamespace(load_dataset=lambda *args, **options: _DataSet(rows))
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert [entry.prompt for entry in prompts.read()] == ["a ", "b"]
    other = dataclasses.replace(prompts, column="text")
    with pytest.raises(InvalidArgument, match="no column 'text'; columns: prompt, chosen"):
        other.read()
