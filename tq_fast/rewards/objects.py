"""Objects that read texts by themselves: pipelines of transformers, and predictors of pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..errors import InvalidArgument
from ..prompts import Prompt
from .base import Texts, WrongScores
from .chats import ChatReader, render
from .classifier import check_label
from .forms import question_text
from .function import AskedReward
from .options import RewardOptions
from .returned import read_scores


class PipelineReward(AskedReward):
    """A text-classification pipeline: its score of the whole text, or of the pair.

    The score is the pipeline's, which applies a sigmoid or softmax unless it was made with
    `function_to_apply="none"`. A chat is rendered by the template of the pipeline's tokenizer.

    Args:
        pipeline: the pipeline.
        texts: decodes with the baseline's tokenizer.
        label: which label is the reward; None where there is one.
        options: how prompts and responses are read.

    Raises:
        InvalidArgument: it has several labels and none is chosen.
    """

    def __init__(
        self, pipeline: Any, texts: Texts, label: int | None, options: RewardOptions
    ) -> None:
        self.source = pipeline
        self.model = pipeline.model
        self.texts = texts
        self.options = options
        self.label = label
        config = pipeline.model.config
        self._label_name = config.id2label[check_label(config.num_labels, label)]
        self._own = pipeline.tokenizer
        self._chats = ChatReader(texts.tokenizer, self._own)

    def ask(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> list[float]:
        """Run the pipeline on every text."""
        inputs = [self._input(*both) for both in zip(prompts, responses, strict=True)]
        options = {"truncation": True} if self.options.truncate else {}
        found = self.source(inputs, top_k=None, **options)
        return [self._score_in(labels) for labels in found]

    def _input(self, prompt: Prompt, token_ids: Sequence[int]) -> Any:
        messages = self._chats.messages(prompt)
        if self.options.pair:
            question = question_text(prompt, messages, self.texts)
            return {"text": question, "text_pair": self.texts.response(token_ids)}
        if messages is None or not self._own.chat_template:
            return self.texts.before(prompt) + self.texts.continuation(prompt, token_ids)
        answer = {"role": "assistant", "content": self.texts.response(token_ids)}
        text = render(self._own, [*messages, answer], opens_answer=False)
        # The pipeline's tokenizer writes its start token itself.
        start = self._own.bos_token
        adds = start and self._own("a")["input_ids"][0] == self._own.bos_token_id
        return text.removeprefix(start) if adds else text

    def _score_in(self, labels: Sequence[dict[str, Any]]) -> float:
        if len(labels) == 1:
            return float(labels[0]["score"])
        return next(float(one["score"]) for one in labels if one["label"] == self._label_name)


class PredictorReward(AskedReward):
    """An object with `predict(pairs) -> scores`, as a CrossEncoder of sentence-transformers.

    A pair is (prompt, response) as text; of a chat the prompt is the contents of its messages, an
    empty line between two.

    Args:
        predictor: the object.
        texts: decodes with the baseline's tokenizer.
        label: the column of its scores that is the reward, where there are several.
    """

    def __init__(self, predictor: Any, texts: Texts, label: int | None) -> None:
        self.source = predictor
        self.model = predictor if isinstance(predictor, torch.nn.Module) else None
        self.texts = texts
        self.label = label
        self._chats = ChatReader(texts.tokenizer, None)

    def ask(self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]]) -> list[float]:
        """Have every pair predicted in one call."""
        pairs = [
            (
                question_text(prompt, self._chats.messages(prompt), self.texts),
                self.texts.response(ids),
            )
            for prompt, ids in zip(prompts, responses, strict=True)
        ]
        found = self.source.predict(pairs)
        if isinstance(found, torch.Tensor):
            found = found.detach().float().cpu().numpy()
        is_table = isinstance(found, np.ndarray) and found.ndim == 2 and found.shape[1] > 1
        if is_table and self.label is None:
            raise WrongScores(
                f"the reward's predict returned {found.shape[1]} scores a pair; reward_index must "
                "say which one is the reward"
            )
        return read_scores(found[:, self.label] if is_table else found)


def is_pipeline(source: Any) -> bool:
    """Whether `source` is a pipeline of transformers, whose module takes long to import."""
    module = sys.modules.get("transformers.pipelines.base")
    return module is not None and isinstance(source, module.Pipeline)


def check_pipeline(pipeline: Any, role: str) -> None:
    """Refuse a pipeline that classifies no texts."""
    if pipeline.task != "text-classification":
        raise InvalidArgument(
            f"{role} must be a pipeline of the task 'text-classification', got {pipeline.task!r}"
        )
