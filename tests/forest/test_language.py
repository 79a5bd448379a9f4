"""`LanguageForest`: its logits are those of the plain model, whatever was done to the forest."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from tests import zoo
from tq_fast.forest.language import LanguageForest, max_positions
from tq_fast.forest.logprobs import score_rows

# fp32 in another order of summation, at logits that reach 15: up to 8e-6 was seen, and 2.1e-5 with
# granite, whose plain model is itself 2.4e-5 from float64 there (the forest 0.6e-5).
ATOL = 3e-5
PROMPTS = [3, 11, 20]
ROWS_PER_TREE = 4
DEPTH = 4
# The tree of each row of a whole forest.
TREE_OF = torch.arange(len(PROMPTS) * ROWS_PER_TREE) // ROWS_PER_TREE


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    return zoo.language_model(name)


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def random_ids(generator: torch.Generator):
    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(zoo.VOCAB_SIZE, shape, generator=generator)

    return draw


def plain_logits(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """Logits after `ids`, by one forward pass of the model as transformers made it."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]


def forest_of(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> LanguageForest:
    forest = LanguageForest(
        model,
        num_trees=len(prompts),
        num_rows=len(prompts) * ROWS_PER_TREE,
        prefix_capacity=max(map(len, prompts)) + DEPTH,
        branch_capacity=DEPTH,
        backend=None,
    )
    for tree, ids in enumerate(prompts):
        forest.prefill(tree, ids)
    return forest


def assert_logits(
    model: PreTrainedModel,
    logits: torch.Tensor,
    sequences: Sequence[Sequence[int]],
    atol: float = ATOL,
) -> None:
    expected = torch.stack([plain_logits(model, ids) for ids in sequences])
    torch.testing.assert_close(logits.float(), expected.float(), rtol=0, atol=atol)


@pytest.mark.parametrize("name", zoo.LANGUAGE_MODELS)
def test_every_architecture_has_the_logits_of_the_plain_model(name: str, random_ids) -> None:
    """A walk through everything that a forest does, against whole sequences."""
    model = model_of(name)
    prefixes = [random_ids(length).tolist() for length in PROMPTS]
    forest = forest_of(model, prefixes)
    assert_logits(model, forest.next_logits, prefixes)

    tokens = random_ids(len(PROMPTS) * ROWS_PER_TREE, DEPTH)
    for depth in range(DEPTH):
        logits = forest.forward_rows(tokens[:, depth], start=depth, tree=TREE_OF)
        rows = tokens[:, : depth + 1].tolist()
        assert_logits(
            model, logits, [prefixes[t] + row for t, row in zip(TREE_OF, rows, strict=True)]
        )
        if depth == 0:
            first_logits = logits

    # Commit another row in each tree but the second.
    chosen = [1, 2 * ROWS_PER_TREE + 3]
    forest.commit([0, 2], chosen, first_logits)
    for tree, row in zip([0, 2], chosen, strict=True):
        prefixes[tree].append(int(tokens[row, 0]))
    assert_logits(model, forest.next_logits, prefixes)

    forest.advance([0, 1, 2], [7, 8, 9])
    for prefix, token in zip(prefixes, [7, 8, 9], strict=True):
        prefix.append(token)
    assert_logits(model, forest.next_logits, prefixes)

    forest.drop_tree(0)
    prefixes = [prefixes[2], prefixes[1]]
    assert_logits(model, forest.next_logits, prefixes)
    # Unequal numbers of rows a tree, over prefixes that a commit has grown.
    tokens = random_ids(3, 2)
    tree = torch.tensor([0, 1, 1])
    for depth in range(2):
        logits = forest.forward_rows(tokens[:, depth], start=depth, tree=tree)
    rows = tokens.tolist()
    assert_logits(
        model, logits, [prefixes[t] + row for t, row in zip(tree.tolist(), rows, strict=True)]
    )


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3", "gpt-oss"])
def test_rows_can_be_put_in_another_order_and_some_left_behind(name: str, random_ids) -> None:
    model = model_of(name)
    prompts = [random_ids(length).tolist() for length in PROMPTS]
    forest = forest_of(model, prompts)
    tokens = random_ids(len(PROMPTS) * ROWS_PER_TREE, 3)
    for depth in range(2):
        forest.forward_rows(tokens[:, depth], start=depth, tree=TREE_OF)
    order = torch.tensor([1, 3, 4, 8, 9, 10, 0, 2, 5, 6, 7, 11])
    forest.cache.take_rows(order, 2)
    staying = order[:6]
    logits = forest.forward_rows(tokens[staying, 2], start=2, tree=staying // ROWS_PER_TREE)
    rows = [prompts[row // ROWS_PER_TREE] + tokens[row].tolist() for row in staying.tolist()]
    assert_logits(model, logits, rows)

    # Row 2 of the first tree left, but its first token can still be committed.
    place = order.tolist().index(2)
    forest.cache.commit([0], torch.tensor([0]), torch.tensor([place]))
    prompts[0].append(int(tokens[2, 0]))
    forest.advance([0], [5])
    assert_logits(model, forest.next_logits[:1], [[*prompts[0], 5]])


@pytest.mark.parametrize("name", zoo.LANGUAGE_MODELS)
def test_score_rows_sums_the_log_probabilities_of_the_plain_model(
    name: str, random_ids, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    prompts = [random_ids(length).tolist() for length in PROMPTS]
    rows = [random_ids(length).tolist() for length in (2, 9, 3, 2, 5)]
    trees = [0, 0, 1, 2, 2]
    expected = []
    for row, tree in zip(rows, trees, strict=True):
        ids = torch.tensor([prompts[tree] + row])
        logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
        start = len(prompts[tree])
        expected.append(sum(float(logprobs[start + at, row[at + 1]]) for at in range(len(row) - 1)))
    forest = forest_of(model, prompts)
    sums = score_rows(forest, rows, trees, vocab_size=zoo.VOCAB_SIZE)
    # The error of one log-prob, up to eight times.
    assert sums == pytest.approx(expected, abs=8 * ATOL)
    # From the model's own logits, in several passes: those of one would be too large.
    monkeypatch.setattr("tq_fast.forest.logprobs.linear_head", lambda model: None)
    monkeypatch.setattr("tq_fast.forest.logprobs._LOGITS_BYTES", 2 * 4 * zoo.VOCAB_SIZE * 8)
    assert score_rows(forest, rows, trees, vocab_size=zoo.VOCAB_SIZE) == pytest.approx(
        expected, abs=8 * ATOL
    )


def test_score_rows_leaves_padded_vocabulary_out(random_ids) -> None:
    model = model_of("llama")
    forest = forest_of(model, [random_ids(4).tolist()])
    row = [1, 2, 3]
    small = score_rows(forest, [row], [0], vocab_size=4)[0]
    assert small > score_rows(forest, [row], [0], vocab_size=zoo.VOCAB_SIZE)[0]


@pytest.mark.parametrize("name", zoo.LANGUAGE_MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_no_more_than_the_plain_model(
    name: str, dtype: torch.dtype, random_ids
) -> None:
    model = zoo.language_model(name, dtype=dtype)
    exact = zoo.language_model(name, dtype=dtype).float()
    prompts = [random_ids(length).tolist() for length in PROMPTS]
    forest = forest_of(model, prompts)
    tokens = random_ids(len(PROMPTS) * ROWS_PER_TREE, 2)
    for depth in range(2):
        logits = forest.forward_rows(tokens[:, depth], start=depth, tree=TREE_OF)
    rows = [prompts[r // ROWS_PER_TREE] + row for r, row in enumerate(tokens.tolist())]
    truth = torch.stack([plain_logits(exact, row) for row in [*prompts, *rows]])
    plain = torch.stack([plain_logits(model, row) for row in [*prompts, *rows]])
    ours = torch.cat([forest.next_logits, logits])
    assert ours.isfinite().all()

    def error(values: torch.Tensor) -> float:
        # The median: where an expert's score is nearly tied, rounding may send a token elsewhere.
        return float((values.float() - truth).abs().median())

    assert error(ours) <= 1.3 * error(plain)


def test_a_forest_counts_the_tokens_that_went_through_the_model(random_ids) -> None:
    forest = forest_of(model_of("llama"), [random_ids(length).tolist() for length in PROMPTS])
    assert forest.num_token_forwards == sum(PROMPTS)
    forest.forward_rows(random_ids(6), start=0, tree=torch.tensor([0, 0, 1, 1, 2, 2]))
    forest.advance([0], [3])
    assert forest.num_token_forwards == sum(PROMPTS) + 6 + 1


def test_the_cache_holds_one_prefix_a_tree_and_one_branch_a_row(random_ids) -> None:
    model = model_of("llama")
    forest = forest_of(model, [random_ids(length).tolist() for length in PROMPTS])
    forest.forward_rows(random_ids(12), start=0, tree=TREE_OF)
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    prefixes = len(PROMPTS) * (max(PROMPTS) + DEPTH)
    assert forest.peak_kv_bytes == per_token * (prefixes + 12 * DEPTH)


def test_the_model_is_left_as_it_was_even_by_a_failure(random_ids) -> None:
    model = zoo.language_model("llama")
    ids = random_ids(8).tolist()
    before = plain_logits(model, ids)
    forest = forest_of(model, [ids])
    assert model.config._attn_implementation == "eager"
    assert torch.equal(plain_logits(model, ids), before)

    def fail(*_: object) -> None:
        raise RuntimeError("in the second layer")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the second layer"):
        forest.forward_rows(random_ids(2), start=0, tree=TREE_OF[:2])
    hook.remove()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(plain_logits(model, ids), before)
    # The forest too: a pass that failed is done again.
    tokens = random_ids(2)
    logits = forest.forward_rows(tokens, start=0, tree=TREE_OF[:2])
    assert_logits(model, logits, [[*ids, token] for token in tokens.tolist()])


def test_two_forests_over_one_model_do_not_meet(random_ids) -> None:
    model = model_of("llama")
    prompts = [random_ids(5).tolist(), random_ids(9).tolist()]
    forests = [forest_of(model, [ids]) for ids in prompts]
    tokens = random_ids(ROWS_PER_TREE, 2)
    for depth in range(2):
        for forest, ids in zip(forests, prompts, strict=True):
            logits = forest.forward_rows(
                tokens[:, depth], start=depth, tree=TREE_OF[:ROWS_PER_TREE]
            )
            rows = tokens[:, : depth + 1].tolist()
            assert_logits(model, logits, [ids + row for row in rows])


def test_a_prompt_of_one_token_is_a_prompt(random_ids) -> None:
    for name in ("llama", "mistral-narrow", "gpt2"):
        forest = forest_of(model_of(name), [[4]])
        assert_logits(model_of(name), forest.next_logits, [[4]])


def test_max_positions_is_where_the_angles_of_longrope_change() -> None:
    assert max_positions(model_of("llama")) == 128
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
    }
    model = zoo.language_model("phi3", rope_parameters=rope, original_max_position_embeddings=16)
    assert max_positions(model) == 16


def head_inputs(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """What the LM head of the plain model reads, `[T, D]`."""
    seen: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3", "gpt2", "opt", "gpt-oss"])
def test_hidden_states_are_what_the_head_of_the_plain_model_reads(name: str, random_ids) -> None:
    model = model_of(name)
    prefixes = [random_ids(length).tolist() for length in PROMPTS]
    forest = LanguageForest(
        model,
        num_trees=3,
        num_rows=6,
        prefix_capacity=max(PROMPTS) + DEPTH,
        branch_capacity=DEPTH,
        backend=None,
        keeps_hidden=True,
    )
    for tree, ids in enumerate(prefixes):
        forest.prefill(tree, ids)

    def assert_states(found: torch.Tensor, sequences: Sequence[Sequence[int]]) -> None:
        expected = torch.stack([head_inputs(model, ids)[-1] for ids in sequences])
        torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)

    assert_states(forest.next_hidden, prefixes)
    tree = torch.tensor([0, 0, 1, 1, 2, 2])
    tokens = random_ids(6, 3)
    for depth in range(3):
        forest.forward_rows(tokens[:, depth], start=depth, tree=tree)
        rows = tokens[:, : depth + 1].tolist()
        assert forest.hidden.shape[:2] == (6, 1)
        whole = [prefixes[t] + row for t, row in zip(tree, rows, strict=True)]
        assert_states(forest.hidden[:, -1], whole)
    forest.advance([0, 2], [7, 8])
    prefixes[0].append(7)
    prefixes[2].append(8)
    assert_states(forest.next_hidden, prefixes)
    # The user's model has no hook of the forest, and the forest's view is of no use to others.
    head = model.get_output_embeddings()
    assert not head._forward_pre_hooks and not head._forward_hooks
    assert forest_of(model, prefixes).hidden is None


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3", "gpt2", "gpt-oss"])
def test_a_text_that_was_kept_is_continued_from_any_place_in_it(name: str, random_ids) -> None:
    model = model_of(name)
    prompts = [random_ids(length).tolist() for length in PROMPTS]
    forest = LanguageForest(
        model,
        num_trees=3,
        num_rows=6,
        prefix_capacity=max(PROMPTS) + 2 * DEPTH,
        branch_capacity=DEPTH,
        backend=None,
    )
    for tree, ids in enumerate(prompts):
        forest.prefill(tree, ids)
    tokens = random_ids(6, DEPTH)
    for depth in range(DEPTH - 1):
        forest.forward_rows(tokens[:, depth], start=depth, tree=torch.tensor([0, 0, 1, 1, 2, 2]))
    # Trees 0 and 2 keep a row each; its last token went through no pass.
    forest.cache.commit_rows([0, 2], [1, 4], [DEPTH - 1, DEPTH - 1])
    texts = {0: prompts[0] + tokens[1].tolist(), 2: prompts[2] + tokens[4].tolist()}
    for cut in (DEPTH, 1, 3, 0, 2):
        sought = {tree: text[: len(prompts[tree]) + cut] for tree, text in texts.items()}
        before = forest.num_token_forwards
        forest.seek([0, 2], [sought[0], sought[2]])
        assert forest.num_token_forwards - before == 2
        assert_logits(model, forest.next_logits, [sought[0], prompts[1], sought[2]])
        new = random_ids(4)
        logits = forest.forward_rows(new, start=0, tree=torch.tensor([0, 0, 1, 2]))
        started = [sought[0], sought[0], prompts[1], sought[2]]
        rows = [[*text, token] for text, token in zip(started, new.tolist(), strict=True)]
        assert_logits(model, logits, rows)
