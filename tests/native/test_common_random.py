"""tq_fast._common against the published generator and against plain Python."""

from __future__ import annotations

import math

import pytest

from tq_fast import _native

MASK = 0xFFFFFFFF


@pytest.fixture(scope="module")
def common():
    return _native.load_common()


def philox_plain(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 written out in Python integers."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (b >> 32) ^ counter[1] ^ key[0],
            b & MASK,
            (a >> 32) ^ counter[3] ^ key[1],
            a & MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter


def uniform_plain(seed: int, purpose: int, key: int, step: int, index: int) -> float:
    words = philox_plain(
        [index & MASK, step & MASK, key & MASK, key >> 32 & MASK],
        [seed & MASK, (seed >> 32 & MASK) ^ purpose],
    )
    bits = (words[0] | words[1] << 32) >> 11
    return min((bits + 0.5) * 2.0**-53, 1 - 2.0**-53)


def test_philox_gives_the_known_answer_for_counter_and_key_zero(common):
    assert common.philox4x32(0, 0, 0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("key", [0, 5, -7, 2**35 + 1])
def test_uniform_of_a_named_draw_equals_plain_python(common, seed, key):
    for purpose in (common.PURPOSE_ROLLOUT, common.PURPOSE_CHOICE):
        for step, index in [(0, 0), (3, 128255), (2**31, 9)]:
            got = common.uniform(seed, purpose, key, step, index)
            assert got == uniform_plain(seed, purpose, key, step, index)
            assert 0.0 < got < 1.0


def test_choice_gumbel_is_minus_log_minus_log_of_its_uniform(common):
    for token_id in range(50):
        u = common.uniform(17, common.PURPOSE_CHOICE, 4, 2, token_id)
        expected = -math.log(-math.log(u))
        assert common.choice_gumbel(17, 4, 2, token_id) == pytest.approx(expected, rel=1e-14)
