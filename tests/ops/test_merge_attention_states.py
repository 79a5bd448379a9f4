"""merge_attention_states: attention over two halves is attention over the whole."""

from __future__ import annotations

import pytest
import torch

from tests.ops import tolerances
from tq_fast.errors import InvalidArgument
from tq_fast.ops import merge_attention_states

OP = "merge_attention_states"
NOTHING = float("-inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_matches_attention_over_all_keys(op, generator, dtype, spread):
    scores = torch.randn(4, 3, 11, generator=generator, dtype=torch.float64) * spread
    values = torch.randn(4, 11, 16, generator=generator, dtype=torch.float64)
    parts = []
    for keys in (slice(0, 7), slice(7, 11)):
        out = (scores[..., keys].softmax(-1) @ values[:, keys]).to(dtype)
        parts.append((out, scores[..., keys].logsumexp(-1).float()))
    merged = op(*parts)
    assert (merged.out.dtype, merged.lse.dtype) == (dtype, torch.float32)
    # The lse of the parts were rounded to fp32, which moves the shares by eps32 times the lse.
    slack = 2e-7 * spread * 4
    torch.testing.assert_close(
        merged.out.double(),
        scores.softmax(-1) @ values,
        rtol=0,
        atol=tolerances.MERGE_OUT[dtype] + slack,
    )
    torch.testing.assert_close(
        merged.lse.double(), scores.logsumexp(-1), rtol=tolerances.LSE_REL, atol=1e-5
    )


@pytest.mark.parametrize("empty", [NOTHING, float("inf"), float("nan")])
@pytest.mark.parametrize("junk", [0.0, float("nan"), float("inf")])
def test_an_empty_state_changes_nothing_whatever_its_output_holds(op, empty, junk):
    full = (torch.tensor([[1.0, -2.0]]), torch.tensor([0.5]))
    nothing = (torch.full((1, 2), junk), torch.tensor([empty]))
    for merged in (op(full, nothing), op(nothing, full)):
        assert torch.equal(merged.out, full[0])
        assert torch.equal(merged.lse, full[1])


@pytest.mark.parametrize("junk", [0.0, float("nan")])
def test_two_empty_states_give_zero_and_minus_infinity(op, junk):
    for a in (NOTHING, float("inf")):
        for b in (NOTHING, float("inf")):
            merged = op(
                (torch.full((2, 3), junk), torch.full((2,), a)),
                (torch.full((2, 3), junk), torch.full((2,), b)),
            )
            assert (merged.out == 0).all()
            assert (merged.lse == NOTHING).all()


def test_lse_as_large_as_fp32_can_hold(op):
    merged = op(
        (torch.zeros(1, 2), torch.tensor([3e38])), (torch.ones(1, 2), torch.tensor([-3e38]))
    )
    assert merged.out.tolist() == [[0.0, 0.0]]
    assert merged.lse.item() == pytest.approx(3e38)


def test_order_does_not_matter(op, generator):
    a = (torch.randn(5, 8, generator=generator), torch.randn(5, generator=generator))
    b = (torch.randn(5, 8, generator=generator), torch.randn(5, generator=generator))
    for x, y in zip(op(a, b), op(b, a), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def test_strided_views_and_no_rows(op, generator):
    out = torch.randn(2, 6, 3, 8, generator=generator).transpose(1, 2)
    lse = torch.randn(2, 6, 3, generator=generator).transpose(1, 2)
    got = op((out, lse), (out.flip(0), lse.flip(0)))
    expected = op(
        (out.contiguous(), lse.contiguous()), (out.flip(0).contiguous(), lse.flip(0).contiguous())
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    merged = op((out[:0], lse[:0]), (out[:0], lse[:0]))
    assert merged.out.shape == (0, 3, 6, 8)
    assert merged.lse.shape == (0, 3, 6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict.fromkeys(("out_a", "lse_a", "out_b", "lse_b"), torch.zeros(())), r"out_a .*\[\]"),
        ({"lse_a": torch.zeros(3)}, r"lse_a .*\[3\].*= \[2\]"),
        ({"lse_b": torch.zeros(2, 1)}, r"lse_b .*\[2, 1\].*= \[2\]"),
        ({"out_b": torch.zeros(2, 5)}, r"out_b .*\[2, 5\].*= \[2, 4\]"),
        ({"out_b": torch.zeros(2, 4).half()}, "out_b is torch.float16, expected torch.float32"),
        ({"lse_a": torch.zeros(2).double()}, "lse_a is torch.float64, expected torch.float32"),
        ({"out_a": torch.zeros(2, 4, dtype=torch.int32)}, "out_a is torch.int32"),
        ({"out_a": torch.zeros(2, 4, requires_grad=True)}, "out_a requires grad"),
    ],
)
def test_rejects(changes, words):
    named = {
        "out_a": torch.zeros(2, 4),
        "lse_a": torch.zeros(2),
        "out_b": torch.zeros(2, 4),
        "lse_b": torch.zeros(2),
    } | changes
    with pytest.raises(InvalidArgument, match=f"merge_attention_states: {words}"):
        merge_attention_states((named["out_a"], named["lse_a"]), (named["out_b"], named["lse_b"]))


def test_compiles_as_one_graph(op, generator):
    def run(out_a, lse_a, out_b, lse_b):
        return op((out_a, lse_a), (out_b, lse_b))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 6):
        outs = torch.randn(2, rows, 8, generator=generator)
        lses = torch.randn(2, rows, generator=generator)
        arguments = (outs[0], lses[0], outs[1], lses[1])
        for a, b in zip(compiled(*arguments), run(*arguments), strict=True):
            torch.testing.assert_close(a, b)
