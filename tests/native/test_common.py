"""tq_fast._common against published numbers and against plain Python or PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tq_fast import _native

MASK = 0xFFFFFFFF


FLOATS = st.floats(width=32, allow_nan=False)


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


@settings(deadline=None)
@given(st.lists(st.tuples(FLOATS, st.integers(0, 2**32 - 1)), max_size=30))
def test_ordered_keys_sort_by_value_descending_then_id_ascending(candidates):
    common = _native.load_common()
    by_key = sorted(candidates, key=lambda c: -common.ordered_key(*c))
    assert by_key == sorted(candidates, key=lambda c: (-c[0], c[1]))
    for value, token_id in candidates:
        key = common.ordered_key(value, token_id)
        assert (common.value_of_key(key), common.id_of_key(key)) == (value, token_id)


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4), max_size=20))
def test_merged_softmax_states_give_logsumexp(values):
    common = _native.load_common()
    state = (-math.inf, 0.0)
    for value in values:
        state = common.merge_softmax(state, (value, 1.0))
    expected = torch.tensor(values, dtype=torch.float64).logsumexp(0).item()
    lse = state[0] + math.log(state[1]) if state[1] > 0 else -math.inf
    assert lse == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_value_of_a_candidate_is_its_weighted_mean(common):
    q, standard_error, ess = common.value_candidate([1.0, 5.0], [math.log(3.0), 0.0], 1.0, False)
    assert q == pytest.approx(2.0)
    assert standard_error == pytest.approx(math.sqrt(2 * (0.75**2 * 1 + 0.25**2 * 9)))
    assert ess == pytest.approx(1.6)
    assert math.isnan(common.value_candidate([], None, 1.0, False)[0])
