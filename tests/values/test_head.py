"""`ValueHead`: its formula, and folders that hold one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.presets.test_value_guided import q_in_fp64
from tq_fast.errors import InvalidArgument
from tq_fast.values.head import ValueHead, ValueHeadConfig


@pytest.fixture
def head(generator: torch.Generator) -> ValueHead:
    config = ValueHeadConfig(12, 20, width=8, rank=4, models={"prior": "abc"}, fit={"r2": 0.5})
    made = ValueHead(config)
    with torch.no_grad():
        for weight in (*made.parameters(), *made.buffers()):
            weight.copy_(torch.rand(weight.shape, generator=generator) + 0.1)
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_those_of_the_formula(
    head: ValueHead, generator: torch.Generator, dtype: torch.dtype
) -> None:
    hidden = torch.randn(6, 12, generator=generator).to(dtype)
    values, directions = head(hidden)
    q = head.q(hidden, torch.arange(6))
    assert values.dtype == directions.dtype == q.dtype == torch.float32
    for row in range(6):
        value, truth = q_in_fp64(head, hidden[row])
        found = values[row] + head.token_embeddings @ directions[row]
        # Sums of a few dozen terms of order 1 to 10 in fp32.
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
        assert float(values[row]) == pytest.approx(value, rel=1e-5)
        assert float(q[row]) == pytest.approx(float(truth[row]), rel=1e-5)


def test_a_new_head_likes_no_token_more_than_another(generator: torch.Generator) -> None:
    head = ValueHead(ValueHeadConfig(12, 20))
    hidden = torch.randn(20, 12, generator=generator)
    assert torch.equal(head.q(hidden, torch.arange(20)), head(hidden)[0])


def test_a_saved_head_is_loaded_with_all_that_it_says_of_itself(
    head: ValueHead, tmp_path: Path
) -> None:
    head.save(tmp_path / "new" / "folder")
    loaded = ValueHead.load(str(tmp_path / "new" / "folder"))
    assert loaded.config == head.config
    assert not loaded.training and not any(w.requires_grad for w in loaded.parameters())
    ours, theirs = head.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def lose_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["value.bias"]
    save_file(weights, folder / "model.safetensors")


def change_config(**changes: object) -> object:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


DAMAGES = {
    "cut": cut_weights,
    "a weight is missing": lose_weights,
    "another format": change_config(format="tq_fast.ValueHead 0"),
    "another size": change_config(width=9),
    "an unknown field": change_config(depth=3),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "a list": lambda folder: (folder / "config.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_by_its_name(
    head: ValueHead, tmp_path: Path, damage: str
) -> None:
    head.save(tmp_path)
    DAMAGES[damage](tmp_path)
    with pytest.raises(InvalidArgument, match=r"^value must be .* got '.*': ") as caught:
        ValueHead.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
