"""vLLM as a worker: its offline engine in this process, as a user of Transfer Q* would call it.

A step asks the baseline's engine for the k likeliest next tokens of every prompt, then for a greedy
roll-out of each of them in one batch, and the reward's engine for the scores of the whole texts.
Both engines keep the KV of what they have seen (prefix caching).
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from typing import Any

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.pooling_params import PoolingParams

from bench.peers.serving import Channel, DecodeSettings, Message, serve, take_stdout

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
PHASES = ("candidates", "rollout", "reward")


class VllmWorker:
    """Two engines, and the Transfer Q* decode that they are in.

    Args:
        folder: holds the models `baseline` and `reward`, and a `tokenizer` for the latter.
        dtype: "fp32" or "bf16".
        is_eager: whether models run without torch.compile.
        block_size: tokens of KV that are shared or not together.
    """

    def __init__(self, folder: str, dtype: str, *, is_eager: bool, block_size: int) -> None:
        options: dict[str, Any] = {
            "tokenizer": f"{folder}/tokenizer",
            "dtype": DTYPES[dtype],
            "enforce_eager": is_eager,
            "enable_prefix_caching": True,
            "block_size": block_size,
            "max_model_len": 4_096,
            "max_num_seqs": 128,
        }
        self.baseline = LLM(f"{folder}/baseline", max_logprobs=20, **options)
        self.reward = LLM(f"{folder}/reward", runner="pooling", convert="classify", **options)

    def describe(self) -> Message:
        return {
            "versions": f"vLLM {vllm.__version__}, torch {torch.__version__}",
            "num_threads": torch.get_num_threads(),
        }

    def begin(self, prompts: list[list[int]], settings: Message) -> Message:
        """Forget what was cached, and decode `warm_steps` tokens of every prompt."""
        self.baseline.reset_prefix_cache()
        self.reward.reset_prefix_cache()
        self.settings = DecodeSettings(**settings)
        self.texts = [list(prompt) for prompt in prompts]
        self.steps: list[list[Message]] = []
        return self.decode(self.settings.warm_steps)

    def decode(self, num_steps: int) -> Message:
        """Decode so many tokens more; return the seconds of each step, and of its phases."""
        self.phases = dict.fromkeys(PHASES, 0.0)
        seconds = []
        for _ in range(num_steps):
            start = time.perf_counter()
            self._step()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "phases": self.phases}

    def end(self) -> Message:
        """Return the record of every step, by prompt."""
        return {"steps": [list(steps) for steps in zip(*self.steps, strict=True)]}

    def encode(self, prompt: list[int]) -> Message:
        start = time.perf_counter()
        (ids,) = self._generate([prompt], max_tokens=1, temperature=0.0)
        return {"seconds": time.perf_counter() - start, "next_token": ids.outputs[0].token_ids[0]}

    def sample(self, prompt: list[int], number: int, num_tokens: int) -> Message:
        start = time.perf_counter()
        (found,) = self._generate([prompt], max_tokens=num_tokens, n=number, temperature=1.0)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "lengths": [len(x.token_ids) for x in found.outputs]}

    def _generate(self, prompts: list[list[int]], **options: Any) -> list[Any]:
        return self.baseline.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(ignore_eos=True, detokenize=False, **options),
            use_tqdm=False,
        )

    def _step(self) -> None:
        k, alpha = self.settings.k, self.settings.alpha
        marks = [time.perf_counter()]
        found = self._generate(self.texts, max_tokens=1, temperature=0.0, logprobs=k)
        proposed = [_candidates(output.outputs[0].logprobs[0], k) for output in found]
        marks.append(time.perf_counter())

        roots = [
            [*text, token]
            for text, candidates in zip(self.texts, proposed, strict=True)
            for token in candidates
        ]
        rolled = self._generate(roots, max_tokens=self.settings.horizon, temperature=0.0)
        whole = [
            [*root, *output.outputs[0].token_ids]
            for root, output in zip(roots, rolled, strict=True)
        ]
        marks.append(time.perf_counter())

        scored = self.reward.classify(
            [{"prompt_token_ids": text} for text in whole],
            pooling_params=PoolingParams(task="classify", use_activation=False),
            use_tqdm=False,
        )
        rewards = [output.outputs.probs[0] for output in scored]
        records = []
        for i, (text, candidates) in enumerate(zip(self.texts, proposed, strict=True)):
            q = rewards[i * k : (i + 1) * k]
            prior = list(candidates.values())
            scores = torch.tensor(prior) + torch.tensor(q) / alpha
            choice = list(candidates)[int(scores.argmax())]
            text.append(choice)
            record = {"candidates": list(candidates), "prior": prior, "q": q, "choice": choice}
            records.append(record)
        self.steps.append(records)
        marks.append(time.perf_counter())
        for name, (before, after) in zip(PHASES, itertools.pairwise(marks), strict=True):
            self.phases[name] += after - before


def _candidates(logprobs: dict[int, Any], k: int) -> dict[int, float]:
    """Return the k likeliest tokens with their log-probs, by falling probability."""
    found = sorted((-entry.logprob, token) for token, entry in logprobs.items())
    return {token: -negative for negative, token in found[:k]}


def main() -> None:
    answers = take_stdout()
    parser = argparse.ArgumentParser(prog="bench.peers.vllm_worker")
    parser.add_argument("folder")
    parser.add_argument("dtype", choices=list(DTYPES))
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--block-size", type=int, default=32)
    args = parser.parse_args()
    worker = VllmWorker(args.folder, args.dtype, is_eager=args.eager, block_size=args.block_size)
    names = ("describe", "begin", "decode", "end", "encode", "sample")
    serve(Channel(sys.stdin, answers), {name: getattr(worker, name) for name in names})


if __name__ == "__main__":
    main()
