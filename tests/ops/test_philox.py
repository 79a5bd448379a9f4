"""The one random stream: known answers, the mapping of a draw to words, and its bounds."""

from __future__ import annotations

import math

import pytest
import torch

from tq_fast.ops import philox

WORD = 0xFFFFFFFF


def philox_in_python_integers(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 from its definition, one block at a time."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & WORD, (low >> 32) ^ c3 ^ k1, low & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def uniform_in_python_integers(seed: int, purpose: int, key: int, step: int, index: int) -> float:
    seed, key = seed % 2**64, key % 2**64
    words = philox_in_python_integers(
        [index & WORD, step & WORD, key & WORD, key >> 32], [seed & WORD, (seed >> 32) ^ purpose]
    )
    return (((words[0] | words[1] << 32) >> 11) + 0.5) * 2.0**-53


# The first is named in the contract; all three come with the generator's authors' library.
KNOWN = [
    ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ([WORD] * 4, [WORD] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    words = philox.philox4x32(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])
    assert " ".join(f"{word:08x}" for word in words[:, 0].tolist()) == answer
    assert philox_in_python_integers(counter, key) == words[:, 0].tolist()


def test_keys_broadcast_against_counters():
    counter = torch.arange(24).reshape(4, 2, 3)
    words = philox.philox4x32(tuple(counter), (torch.tensor(5), torch.tensor([6, 7, 8])))
    assert words.shape == (4, 2, 3)
    block = philox_in_python_integers(counter[:, 1, 2].tolist(), [5, 8])
    assert words[:, 1, 2].tolist() == block


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF0, 2**64 - 3])
@pytest.mark.parametrize("purpose", [philox.ROLLOUT, philox.CHOICE])
def test_a_draw_is_the_documented_function_of_its_five_numbers(seed, purpose):
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
    for step, index in ((0, 0), (7, 3), (2**31, 2**31 + 5), (-1, 128255)):
        got = philox.uniform(seed, purpose, keys, step, index).tolist()
        expected = [
            uniform_in_python_integers(seed, purpose, key, step, index) for key in keys.tolist()
        ]
        assert got == expected


def test_seed_step_and_index_may_be_tensors():
    keys = torch.arange(5)
    expected = philox.uniform(-3, philox.CHOICE, keys, 4, 9)
    for seed, step in ((torch.tensor(-3), torch.tensor([4])), (torch.tensor([-3]), 4)):
        index = torch.full((5,), 9, dtype=torch.int32)
        assert torch.equal(philox.uniform(seed, philox.CHOICE, keys, step, index), expected)
    table = philox.uniform(-3, philox.CHOICE, keys[:, None], 4, torch.arange(12))
    assert table.shape == (5, 12)
    assert torch.equal(table[:, 9], expected)


def test_a_seed_wraps_modulo_two_to_the_64():
    keys = torch.arange(3)
    wrapped = philox.uniform(2**64 + 11, philox.ROLLOUT, keys, 0)
    assert torch.equal(wrapped, philox.uniform(11, philox.ROLLOUT, keys, 0))


def test_no_keys_no_draws():
    assert philox.uniform(0, philox.ROLLOUT, torch.zeros(0, dtype=torch.int64), 0).shape == (0,)


@pytest.mark.parametrize("word", [0, WORD])
def test_the_interval_is_open_at_the_extreme_words(monkeypatch, word):
    monkeypatch.setattr(philox, "philox4x32", lambda counter, key: torch.full((4, 1), word))
    uniform = philox.uniform(0, philox.ROLLOUT, torch.tensor([0]), 0).item()
    assert 0.0 < uniform < 1.0
    noise = philox.gumbel(0, torch.tensor([0]), 0, torch.tensor([0])).item()
    # 53 bits reach the tails that 24 bits cut at 16.6 (and -2.8).
    expected = -math.log(-math.log(2.0**-54)) if word == 0 else 53 * math.log(2)
    assert noise == pytest.approx(expected, rel=1e-6)


def test_uniforms_of_every_coordinate_are_uniform_and_unrelated():
    n = 1 << 16
    numbers = torch.arange(n)
    zero = torch.zeros(1, dtype=torch.int64)
    streams = {
        "keys": philox.uniform(1, philox.ROLLOUT, numbers, 0),
        "keys, next step": philox.uniform(1, philox.ROLLOUT, numbers, 1),
        "keys, other purpose": philox.uniform(1, philox.CHOICE, numbers, 0),
        "keys, next seed": philox.uniform(2, philox.ROLLOUT, numbers, 0),
        "high words of keys": philox.uniform(1, philox.ROLLOUT, numbers << 32, 0),
        "indices": philox.uniform(1, philox.ROLLOUT, zero, 0, numbers),
    }
    for name, draws in streams.items():
        counts = torch.histc(draws, bins=256, min=0, max=1)
        expected = n / 256
        statistic = ((counts - expected) ** 2 / expected).sum().item()
        assert statistic < 255 + 10 * math.sqrt(2 * 255), name
    names = list(streams)
    table = torch.stack([streams[name] - 0.5 for name in names]) * math.sqrt(12)
    # Correlations of n unrelated pairs have standard deviation n^-0.5.
    correlation = (table @ table.T / n).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(n), names
