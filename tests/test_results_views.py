"""What a result shows: the picture of a trace, and the table of a notebook."""

from __future__ import annotations

import builtins
import dataclasses
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tq_fast
from tq_fast import DecodeResult
from tq_fast.models.tiny import load_tiny_world

WORLD = load_tiny_world()
PROMPTS = list(WORLD.prompts[:2])


@pytest.fixture(scope="module")
def result() -> DecodeResult:
    return tq_fast.decode(
        PROMPTS, WORLD.baseline, WORLD.reward, sft=WORLD.sft, k=4, horizon=4, max_new_tokens=12
    )


@pytest.fixture(scope="module")
def best() -> DecodeResult:
    return tq_fast.presets.best_of_n(
        PROMPTS, WORLD.baseline, WORLD.reward, n=3, max_new_tokens=8, num_return_sequences=2
    )


class Cells(HTMLParser):
    """The text of every cell of a table, by rows, and the tags that were met."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.rows[-1][-1] += data


def panels(figure: Any) -> list[Any]:
    return [axis for axis in figure.axes if axis.get_visible()]


def names_of(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_yticklabels()]


def test_a_panel_shows_candidates_their_q_both_laws_and_the_choice(result: DecodeResult) -> None:
    figure = result.plot_trace(1, steps=[2])
    (axis,) = panels(figure)
    step = result.traces[1][2]
    texts = [result.tokenizer.decode([token]).strip() for token in step.candidates]
    expected = [
        f"{'▶ ' if place == step.choice else ''}{text}  Q {q:+.2f}"
        for place, (text, q) in enumerate(zip(texts, step.q.tolist(), strict=True))
    ]
    assert names_of(axis) == expected
    assert axis.get_yticklabels()[step.choice].get_fontweight() == "bold"
    prior, final = ([bar.get_width() for bar in container] for container in axis.containers)
    assert prior == pytest.approx(step.prior_logprobs.exp().tolist())
    assert final == pytest.approx(step.final_logprobs.exp().tolist())
    title = axis.get_title(loc="right")
    assert title.startswith("token 3, after “…")
    before = result.tokenizer.decode(result.sequences[1][:2]).split()
    assert title.removesuffix("”").endswith(before[-1])


def test_without_steps_the_six_that_moved_furthest_are_drawn(result: DecodeResult) -> None:
    def moved(step: Any) -> float:
        prior = step.prior_logprobs.softmax(-1)
        return float((step.final_logprobs.exp() - prior).abs().sum())

    trace = result.traces[0]
    assert len(trace) > 6
    order = sorted(range(len(trace)), key=lambda idx: -moved(trace[idx]))
    titles = [axis.get_title(loc="right") for axis in panels(result.plot_trace())]
    numbers = [int(re.match(r"token (\d+)", title).group(1)) for title in titles]
    assert numbers == sorted(idx + 1 for idx in order[:6])


def test_a_figure_is_a_picture_in_a_notebook(result: DecodeResult, tmp_path: Path) -> None:
    figure = result.plot_trace()
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "trace.pdf")
    assert (tmp_path / "trace.pdf").read_bytes().startswith(b"%PDF")


def test_candidates_that_were_not_needed_have_no_q_and_no_bar(result: DecodeResult) -> None:
    step = result.traces[0][0]
    q = step.q.clone()
    q[-1] = torch.nan
    partial = dataclasses.replace(
        step, q=q, final_logprobs=torch.full_like(step.final_logprobs, torch.nan)
    )
    changed = dataclasses.replace(result, traces=[[partial, *result.traces[0][1:]]])
    (axis,) = panels(changed.plot_trace(0, steps=[0]))
    assert names_of(axis)[-1].endswith("not needed")
    assert [bar.get_width() for bar in axis.containers[1]] == [0.0] * len(q)
    assert len(panels(changed.plot_trace(0))) == 6


def test_text_that_looks_like_markup_is_drawn_as_it_is(result: DecodeResult) -> None:
    class Odd:
        def decode(self, ids: Any) -> str:
            return "$x_{$\n" if len(ids) == 1 else "$\\frac{$"

    odd = dataclasses.replace(result, tokenizer=Odd())
    figure = odd.plot_trace(0, steps=[0, 1])
    figure._repr_png_()
    assert "$x_{$  Q" in names_of(panels(figure)[0])[-1]


def test_a_loaded_result_draws_token_ids(result: DecodeResult, tmp_path: Path) -> None:
    result.save(tmp_path / "result.json")
    loaded = DecodeResult.load(tmp_path / "result.json")
    assert loaded == result and loaded.prompts == PROMPTS and loaded.tokenizer is None
    (axis,) = panels(loaded.plot_trace(0, steps=[0]))
    ids = [name.replace("▶ ", "").split()[0] for name in names_of(axis)]
    assert ids == [str(token) for token in result.traces[0][0].candidates.tolist()]
    assert pickle.loads(pickle.dumps(result)).tokenizer is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"idx": 2}, "idx must be an index below 2, got 2"),
        ({"idx": True}, "idx must be an index below 2, got True"),
        ({"steps": [99]}, "steps must be an index below"),
        ({"steps": [0.5]}, "steps must be an index below .*, got 0.5"),
        ({"steps": []}, r"steps must be indices of tokens, one at least, got \[\]"),
        ({"steps": 3}, "steps must be indices of tokens, one at least, got 3"),
    ],
)
def test_what_is_not_there_is_refused(result: DecodeResult, given: Any, message: str) -> None:
    with pytest.raises(tq_fast.InvalidArgument, match=message):
        result.plot_trace(**given)


def test_indices_may_count_from_the_end_and_come_from_numpy(result: DecodeResult) -> None:
    num = len(result.traces[1])
    figure = result.plot_trace(-1, steps=np.array([-1, 0]))
    assert figure.get_suptitle() == "Response 1"
    titles = [axis.get_title(loc="right") for axis in panels(figure)]
    assert [title.split(",")[0] for title in titles] == [f"token {num}", "token 1"]


def test_a_method_without_candidates_has_no_such_picture(best: DecodeResult) -> None:
    with pytest.raises(tq_fast.InvalidArgument, match="`stages` has the choices between texts"):
        best.plot_trace()


def test_without_matplotlib_the_error_says_what_to_install(
    result: DecodeResult, monkeypatch: Any
) -> None:
    real = builtins.__import__

    def refuse(name: str, *given: Any, **options: Any) -> Any:
        if name.startswith("matplotlib") or name == "trace_figure":
            raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")
        return real(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(tq_fast.TqFastError, match=r"pip install 'tq-fast\[plots\]'"):
        result.plot_trace()


def test_the_table_has_a_line_for_every_response(result: DecodeResult) -> None:
    html = Cells(result._repr_html_())
    names, *lines = html.rows
    assert names == [
        *("prompt", "response", "tokens", "KL to sft", "KL to baseline", "last Q", "reward"),
    ]
    for idx, line in enumerate(lines):
        certificate, last = result.certificates[idx], result.traces[idx][-1]
        assert line == [
            PROMPTS[idx],
            result.texts[idx],
            str(len(result.sequences[idx])),
            f"≤ {certificate.kl_to_sft:.2f}",
            f"≤ {certificate.kl_to_baseline:.2f}",
            f"{last.q[last.choice]:+.2f}",
            "",
        ]
    assert html.tags == {"table", "tr", "th", "td"}


def test_a_text_that_was_scored_shows_its_reward(best: DecodeResult) -> None:
    _, *lines = Cells(best._repr_html_()).rows
    assert [line[0] for line in lines] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert [line[-1] for line in lines] == [
        f"{max(trace[0].rewards[0]):+.2f}" for trace in best.traces
    ]
    plain = tq_fast.presets.baseline(PROMPTS[0], WORLD.baseline, WORLD.reward, max_new_tokens=4)
    assert Cells(plain._repr_html_()).rows[1][-2:] == ["", ""]


def test_the_reward_of_a_roll_out_is_not_shown_as_that_of_the_text() -> None:
    single = tq_fast.decode(
        PROMPTS[0], WORLD.baseline, WORLD.reward, k=1, horizon=2, max_new_tokens=3
    )
    assert single.traces[0][0].rewards.shape == (1, 1)
    _, line = Cells(single._repr_html_()).rows
    assert line[-2:] == [f"{single.traces[0][-1].q[0]:+.2f}", ""]


def test_a_text_that_a_value_head_guided_shows_its_reward(result: DecodeResult) -> None:
    step = result.traces[0][0]
    drawn = dataclasses.replace(
        step,
        candidates=step.candidates[:1],
        rewards=torch.tensor([[1.5]]),
        q=torch.tensor([0.5]),
        value=0.25,
        choice=0,
    )
    guided = dataclasses.replace(result, traces=[[drawn], result.traces[1]])
    assert Cells(guided._repr_html_()).rows[1][-2:] == ["+0.50", "+1.50"]


def test_text_in_the_table_is_escaped(result: DecodeResult) -> None:
    odd = dataclasses.replace(
        result,
        prompts=[[{"role": "user", "content": "<b>&"}], [3, 4]],
        texts=["<script>alert(1)</script>", ""],
    )
    html = odd._repr_html_()
    assert "<script" not in html and "<b>" not in html
    assert "mathjax_ignore" in html, "dollars are no formulas"
    _, first, second = Cells(html).rows
    assert first[:2] == ["user: <b>&", "<script>alert(1)</script>"]
    assert second[:2] == ["[3, 4]", ""]


def test_a_long_result_shows_its_first_lines_and_counts_the_others(result: DecodeResult) -> None:
    fields = ("texts", "sequences", "traces", "certificates", "stages", "prompts")
    many = dataclasses.replace(result, **{name: getattr(result, name) * 13 for name in fields})
    rows = Cells(many._repr_html_()).rows
    assert len(rows) == 1 + 20 + 1
    assert rows[-1] == ["and 6 more"]
