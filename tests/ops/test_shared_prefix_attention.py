"""shared_prefix_attention against attention in float64, one query at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tq_fast.ops import merge_attention_states, shared_prefix_attention

OP = "shared_prefix_attention"


def problem(
    generator: torch.Generator,
    *,
    counts: tuple[int, ...] = (3,),
    heads: tuple[int, int] = (4, 2),
    new: int = 1,
    prefix: int = 20,
    branch: int = 5,
    size: int = 16,
    dtype: torch.dtype = torch.float32,
    prefix_len: list[int] | None = None,
    branch_len: list[int] | None = None,
) -> dict[str, Tensor]:
    """A forest whose memory beyond every length holds NaN, in views of larger buffers."""
    trees, rows = len(counts), sum(counts)
    num_heads, num_kv_heads = heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    prefix_lens = torch.tensor([prefix] * trees if prefix_len is None else prefix_len)
    branch_lens = torch.tensor([branch] * rows if branch_len is None else branch_len)
    prefix_kv = normal(2, trees, num_kv_heads, prefix + 3, size)
    branch_kv = normal(2, rows, num_kv_heads, branch + 2, size)
    for tree, length in enumerate(prefix_lens.tolist()):
        prefix_kv[:, tree, :, length:] = torch.nan
    for row, length in enumerate(branch_lens.tolist()):
        branch_kv[:, row, :, length:] = torch.nan
    even = len(set(counts)) == 1
    return {
        # Models hand queries over in this layout: heads behind tokens in memory.
        "q": normal(rows, new, num_heads, size).transpose(1, 2),
        "prefix_k": prefix_kv[0][:, :, :prefix],
        "prefix_v": prefix_kv[1][:, :, :prefix],
        "prefix_len": prefix_lens,
        "branch_k": branch_kv[0][:, :, :branch],
        "branch_v": branch_kv[1][:, :, :branch],
        "branch_len": branch_lens,
        "tree": None if even else torch.arange(trees).repeat_interleave(torch.tensor(counts)),
    }


def exact(
    inputs: dict[str, Tensor],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) in float64, each query by itself over the list of keys that it sees."""
    q = inputs["q"].double()
    rows, num_heads, num_new, size = q.shape
    trees, num_kv_heads = inputs["prefix_k"].shape[:2]
    out = torch.zeros_like(q)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float64)
    for row in range(rows):
        tree = row // (rows // trees) if inputs["tree"] is None else inputs["tree"][row].item()
        start, length = inputs["prefix_len"][tree].item(), inputs["branch_len"][row].item()
        for head in range(num_heads):
            kv = head // (num_heads // num_kv_heads)
            keys, values = (
                torch.cat(
                    (
                        inputs[f"prefix_{x}"][tree, kv, :start],
                        inputs[f"branch_{x}"][row, kv, :length],
                    )
                ).double()
                for x in "kv"
            )
            for t in range(num_new):
                last = start + length - num_new + t
                first = 0 if window is None else max(0, last - window + 1)
                scores = keys[first : last + 1] @ q[row, head, t]
                scores = scores * (size**-0.5 if scale is None else scale)
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if scores.numel():
                    lse[row, head, t] = scores.logsumexp(0)
                    out[row, head, t] = scores.softmax(0) @ values[first : last + 1]
    return out, lse


def arguments(inputs: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    names = ("q", "prefix_k", "prefix_v", "prefix_len", "branch_k", "branch_v", "branch_len")
    return tuple(inputs[name] for name in names), {"tree": inputs["tree"]}


def check(run, inputs: dict[str, Tensor], **parameters: Any) -> None:
    positional, keyword = arguments(inputs)
    out, lse = run(*positional, **keyword, **parameters)
    expected_out, expected_lse = exact(inputs, **parameters)
    dtype = inputs["q"].dtype
    assert (out.dtype, out.shape) == (dtype, inputs["q"].shape)
    assert (lse.dtype, lse.shape) == (torch.float32, inputs["q"].shape[:-1])
    atol = tolerances.ATTENTION_OUT[dtype]
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=atol)
    atol = tolerances.ATTENTION_LSE[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerances.LSE_REL, atol=atol)


CASES: dict[str, dict[str, Any]] = {
    "one row": {"counts": (1,)},
    "one tree": {"counts": (5,)},
    "one key": {"counts": (2,), "prefix": 0, "branch": 1},
    "trees of one row": {"counts": (1, 1, 1)},
    "even trees": {"counts": (3, 3)},
    "uneven trees": {"counts": (1, 4, 2)},
    "a tree without rows": {"counts": (0, 3, 0, 2)},
    "a tree without rows between equals": {"counts": (3, 0, 3)},
    "uneven and ragged": {"counts": (2, 3, 1), "prefix_len": [20, 20, 7]},
    "ragged prefixes": {"counts": (2, 2, 2), "prefix_len": [20, 0, 3]},
    "ragged branches": {"counts": (4,), "branch_len": [5, 1, 3, 2]},
    "all ragged": {"counts": (2, 1, 3), "prefix_len": [1, 0, 19], "branch_len": [5, 1, 3, 2, 5, 4]},
    "no prefix": {"counts": (3,), "prefix": 0},
    "empty prefix of a long buffer": {"counts": (3,), "prefix_len": [0]},
    "branch of one": {"counts": (4,), "branch": 1},
    "several new tokens": {"counts": (3,), "new": 4, "branch": 4},
    "several new tokens after others": {"counts": (2, 2), "new": 3, "branch": 7},
    "several new tokens, ragged": {
        "counts": (3, 1),
        "new": 3,
        "branch": 7,
        "branch_len": [7, 3, 5, 4],
        "prefix_len": [20, 6],
    },
    "a prompt": {"counts": (1,), "prefix": 0, "new": 33, "branch": 33},
    "more rows than a block": {"counts": (70,), "prefix": 600},
    "rows that share tiles": {
        "counts": (2, 0, 3, 1),
        "new": 17,
        "branch": 20,
        "branch_len": [20, 17, 19, 18, 20, 17],
        "prefix_len": [20, 5, 0, 13],
    },
}
HEADS = {"one head": (1, 1), "own keys": (3, 3), "grouped": (8, 2), "one for all": (5, 1)}


@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize("case", list(CASES))
def test_matches_float64(op, generator, case, heads):
    check(op, problem(generator, heads=HEADS[heads], **CASES[case]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 8, 64, 80, 128])
def test_head_sizes_and_dtypes(op, generator, size, dtype):
    check(op, problem(generator, counts=(3, 3), size=size, dtype=dtype, prefix=140))
    check(op, problem(generator, counts=(3,), size=size, dtype=dtype, new=3, branch=4))


@pytest.mark.parametrize("window", [1, 2, 4, 5, 6, 15, 24, 25, 26, 1000])
@pytest.mark.parametrize(
    "case",
    ["one tree", "even trees", "uneven and ragged", "all ragged", "no prefix", "a prompt"]
    + [name for name in CASES if name.startswith("several")]
    + ["rows that share tiles"],
)
def test_sliding_windows(op, generator, case, window):
    check(op.or_auto, problem(generator, **CASES[case]), window=window)


def test_a_window_over_long_prefixes_of_several_lengths(op, generator):
    inputs = problem(generator, counts=(2, 1), prefix=400, prefix_len=[400, 170])
    check(op.or_auto, inputs, window=150)


def test_a_row_does_not_depend_on_longer_prefixes_in_the_batch(op, generator):
    inputs = problem(generator, counts=(2, 2), prefix=2500, prefix_len=[300, 2500])
    positional, _ = arguments(inputs)
    whole = op(*positional)
    q, prefix_k, prefix_v, prefix_len, *branch = positional
    own = (prefix_k[:1, :, :300], prefix_v[:1, :, :300], prefix_len[:1])
    alone = op(q[:2], *own, *(tensor[:2] for tensor in branch))
    # The reference sums over the whole buffer, in an order that follows from its size.
    atol = 1e-6 if op.backend == "ref" else 0.0
    for a, b in zip(alone, whole, strict=True):
        torch.testing.assert_close(a, b[:2], rtol=0, atol=atol)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
@pytest.mark.parametrize("case", ["even trees", "all ragged", "several new tokens"])
def test_soft_caps(op, generator, case, softcap):
    check(op.or_auto, problem(generator, **CASES[case]), softcap=softcap, scale=1.7)
    check(op.or_auto, problem(generator, **CASES[case]), softcap=softcap, window=6)


@pytest.mark.parametrize("scale", [0.0, 0.03, 4.0, -0.5])
def test_scales(op, generator, scale):
    check(op, problem(generator, counts=(2, 2)), scale=scale)


@pytest.mark.parametrize("new", [0, 1])
def test_empty_inputs(op, generator, new):
    inputs = problem(generator, counts=(2, 2), new=new, branch=3)
    positional, _ = arguments(inputs)
    if new:
        positional = tuple(
            tensor if name.startswith("prefix") else tensor[:0]
            for name, tensor in zip(
                ("q", "prefix_k", "prefix_v", "prefix_len", "branch", "branch", "branch"),
                positional,
                strict=True,
            )
        )
    out, lse = op(*positional)
    assert out.shape == positional[0].shape
    assert lse.shape == positional[0].shape[:-1]


def test_no_trees_and_no_rows(op):
    kv = torch.zeros(0, 2, 5, 8)
    none = torch.zeros(0, dtype=torch.int64)
    out, lse = op(torch.zeros(0, 4, 1, 8), kv, kv, none, kv, kv, none)
    assert out.shape == (0, 4, 1, 8)
    assert lse.shape == (0, 4, 1)


@pytest.mark.parametrize("branch_len", [[0, 0, 0, 0], [0, 2, 0, 2]])
def test_a_query_that_sees_no_key_gives_zero_and_minus_infinity(op, generator, branch_len):
    inputs = problem(generator, counts=(2, 2), branch=2, prefix_len=[0, 4], branch_len=branch_len)
    positional, _ = arguments(inputs)
    out, lse = op(*positional)
    sees = torch.tensor([branch_len[0] > 0, branch_len[1] > 0, True, True])
    assert (out[~sees] == 0).all() and (lse[~sees] == -torch.inf).all()
    expected_out, expected_lse = exact(inputs)
    atol = tolerances.ATTENTION_OUT[torch.float32]
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=atol)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=atol)


@pytest.mark.parametrize("new", [1, 3, 20])
def test_a_layer_reads_the_output_without_a_copy(op, generator, new):
    positional, _ = arguments(problem(generator, heads=(8, 2), new=new, branch=new))
    out, _ = op(*positional)
    # tests/native asks the same of the C++ kernel; other ways on a CPU may copy.
    assert out.transpose(1, 2).is_contiguous() or op.backend != "triton"


def test_int32_lengths_and_trees(op, generator):
    inputs = problem(generator, counts=(1, 4, 2), prefix_len=[4, 20, 9])
    for name in ("prefix_len", "branch_len", "tree"):
        inputs[name] = inputs[name].int()
    check(op, inputs)


def test_large_scores_do_not_overflow(op, generator):
    inputs = problem(generator, counts=(3,))
    inputs["q"] = inputs["q"] * 1e4
    positional, _ = arguments(inputs)
    out, lse = op(*positional)
    expected_out, expected_lse = exact(inputs)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=1e-2)


def test_the_lse_lets_states_over_parts_be_merged(op, generator):
    inputs = problem(generator, counts=(3,), prefix=30)
    (q, prefix_k, prefix_v, _, branch_k, branch_v, branch_len), _ = arguments(inputs)
    whole = op(q, prefix_k, prefix_v, torch.tensor([30]), branch_k, branch_v, branch_len)
    none = branch_k[:, :, :0]
    first = op(
        q, prefix_k, prefix_v, torch.tensor([12]), none, none, torch.zeros(3, dtype=torch.int64)
    )
    rest = op(
        q,
        prefix_k[:, :, 12:],
        prefix_v[:, :, 12:],
        torch.tensor([18]),
        branch_k,
        branch_v,
        branch_len,
    )
    for a, b in zip(merge_attention_states(first, rest), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerances.ATTENTION_OUT[torch.float32])


def test_the_branches_of_a_row_are_its_own(op, generator):
    inputs = problem(generator, counts=(4, 4), prefix_len=[20, 11])
    positional, _ = arguments(inputs)
    whole = op(*positional)
    for name in ("q", "branch_k", "branch_v"):
        inputs[name] = inputs[name].clone()
        inputs[name][[0, 3, 6]] = 50.0
    inputs["prefix_k"] = inputs["prefix_k"].clone()
    inputs["prefix_k"][1] = 3.0
    positional, _ = arguments(inputs)
    again = op(*positional)
    for a, b in zip(again, whole, strict=True):
        assert torch.equal(a[[1, 2]], b[[1, 2]])


def test_a_tree_decodes_alone_as_in_a_forest(op, generator):
    inputs = problem(generator, counts=(3, 3, 3), prefix_len=[20, 11, 20], prefix=20)
    positional, _ = arguments(inputs)
    whole = op(*positional)
    for tree in range(3):
        rows = slice(3 * tree, 3 * tree + 3)
        own = slice(tree, tree + 1)
        cuts = (rows, own, own, own, rows, rows, rows)
        alone = op(*(tensor[cut] for tensor, cut in zip(positional, cuts, strict=True)))
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a, b[rows])


def test_nothing_is_written_but_the_outputs(op, generator):
    inputs = problem(generator, counts=(2, 2), branch_len=[5, 2, 1, 5])
    before = {name: t.clone() for name, t in inputs.items() if t is not None}
    positional, keyword = arguments(inputs)
    op(*positional, **keyword)
    for name, tensor in before.items():
        torch.testing.assert_close(inputs[name], tensor, rtol=0, atol=0, equal_nan=True)


def valid_arguments() -> dict[str, Tensor]:
    return {
        "q": torch.zeros(4, 4, 1, 8),
        "prefix_k": torch.zeros(2, 2, 6, 8),
        "prefix_v": torch.zeros(2, 2, 6, 8),
        "prefix_len": torch.tensor([6, 6]),
        "branch_k": torch.zeros(4, 2, 3, 8),
        "branch_v": torch.zeros(4, 2, 3, 8),
        "branch_len": torch.full((4,), 3),
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(4, 4, 8)}, "q .* 4 axes"),
        ({"q": torch.zeros(4, 4, 1, 0)}, "d, the last axis of q, is 0, expected 1"),
        ({"prefix_k": torch.zeros(2, 2, 8)}, "prefix_k .* 4 axes"),
        ({"branch_k": torch.zeros(4, 2, 8)}, "branch_k .* 4 axes"),
        ({"prefix_k": torch.zeros(2, 2, 6, 4)}, r"prefix_k .*\[2, 2, 6, 4\].*= \[2, 2, 6, 8\]"),
        ({"prefix_v": torch.zeros(2, 2, 5, 8)}, r"prefix_v .*\[2, 2, 5, 8\].*= \[2, 2, 6, 8\]"),
        ({"branch_k": torch.zeros(3, 2, 3, 8)}, r"branch_k .*\[3, 2, 3, 8\].*= \[4, 2, 3, 8\]"),
        ({"branch_v": torch.zeros(4, 2, 2, 8)}, r"branch_v .*\[4, 2, 2, 8\].*= \[4, 2, 3, 8\]"),
        ({"q": torch.zeros(4, 3, 1, 8)}, "q has 3 heads, expected a multiple of prefix_k's 2"),
        (
            {"q": torch.zeros(4, 4, 1, 8).half()},
            "prefix_k is torch.float32, expected torch.float16",
        ),
        ({"branch_v": torch.zeros(4, 2, 3, 8).double()}, "branch_v is torch.float64"),
        ({"prefix_len": torch.tensor([6])}, r"prefix_len .*\[1\].*= \[2\]"),
        ({"prefix_len": torch.tensor([6.0, 6.0])}, "prefix_len is torch.float32"),
        ({"branch_len": torch.full((2,), 3)}, r"branch_len .*\[2\].*= \[4\]"),
        ({"tree": torch.tensor([0, 1])}, r"tree .*\[2\].*= \[4\]"),
        ({"tree": torch.zeros(4)}, "tree is torch.float32"),
        ({"prefix_len": torch.tensor([6, 7])}, r"prefix_len\[1\] is 7, expected 0 to 6"),
        ({"prefix_len": torch.tensor([-1, 6])}, r"prefix_len\[0\] is -1, expected 0 to 6"),
        ({"branch_len": torch.tensor([3, 3, 4, 3])}, r"branch_len\[2\] is 4, expected 0 to 3"),
        ({"tree": torch.tensor([0, 0, 1, 2])}, r"tree\[3\] is 2, expected 0 to 1"),
        ({"tree": torch.tensor([-1, 0, 1, 1])}, r"tree\[0\] is -1, expected 0 to 1"),
        ({"softcap": 0.0}, "softcap is 0.0, expected a number above 0"),
        ({"window": 0}, "window is 0, expected 1 to"),
        ({"prefix_v": torch.zeros(2, 2, 6, 8, requires_grad=True)}, "prefix_v requires grad"),
    ],
)
def test_rejects(rejects, changes, words):
    rejects(
        f"shared_prefix_attention: {words}",
        lambda: shared_prefix_attention(**valid_arguments() | changes),
    )


def test_rejects_integers_and_rows_that_do_not_divide(rejects):
    given = valid_arguments()
    whole = {
        name: tensor if name.endswith("len") else tensor.int() for name, tensor in given.items()
    }
    rejects(r"q is torch.int32", lambda: shared_prefix_attention(**whole))
    three = {"prefix_k": torch.zeros(3, 2, 6, 8), "prefix_v": torch.zeros(3, 2, 6, 8)}
    three["prefix_len"] = torch.tensor([6, 6, 6])
    rejects(
        "q has 4 rows, expected a multiple of the 3 trees",
        lambda: shared_prefix_attention(**given | three),
    )


@pytest.mark.parametrize("backend", ["ref", None])
def test_compiles_as_one_graph(generator, backend):
    compiled = torch.compile(
        lambda *tensors: shared_prefix_attention(*tensors, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for prefix in (20, 31):
        positional, _ = arguments(problem(generator, counts=(2, 2), prefix=prefix))
        expected = shared_prefix_attention(*positional, backend=backend)
        for a, b in zip(compiled(*positional), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
