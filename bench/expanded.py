"""Transfer Q* with `generate` over copies of the prompt's KV: the best that transformers offers.

This stands between the naive loop and ours: both models encode the prompt once, and its KV is
copied for every candidate (`batch_repeat_interleave`). Roll-outs and choice are greedy, and no
token ends a sequence.
"""

from __future__ import annotations

import copy
import time

import torch
from transformers import DynamicCache, GenerationConfig

from bench.decode_models import Duo


@torch.inference_mode()
def decode_expanded(
    duo: Duo, prompt: torch.Tensor, *, k: int, horizon: int, num_tokens: int, alpha: float = 1.0
) -> tuple[list[int], list[float], int]:
    """Return the new tokens, the seconds of each, and the bytes of the baseline's copied KV.

    The first token's seconds include the encoding of the prompt.
    """
    generation = GenerationConfig(max_new_tokens=horizon, do_sample=False, pad_token_id=0)
    caches = {"baseline": DynamicCache(), "reward": DynamicCache()}
    text, seconds, num_bytes = prompt[None], [], 0
    new = text
    for _ in range(num_tokens):
        start = time.perf_counter()
        logits = duo.baseline(new, past_key_values=caches["baseline"], logits_to_keep=1).logits
        duo.reward.model(new, past_key_values=caches["reward"])
        best = logits[0, -1].float().log_softmax(-1).topk(k)
        candidates = best.indices[:, None]
        copies = copy.deepcopy(caches["baseline"])
        copies.batch_repeat_interleave(k)
        whole = torch.cat([text.expand(k, -1), candidates], 1)
        output = duo.baseline.generate(
            input_ids=whole,
            attention_mask=torch.ones_like(whole),
            past_key_values=copies,
            generation_config=generation,
        )
        num_bytes = max(num_bytes, cache_bytes(copies))
        suffixes = output[:, text.shape[1] :]
        copies = copy.deepcopy(caches["reward"])
        copies.batch_repeat_interleave(k)
        hidden = duo.reward.model(suffixes, past_key_values=copies).last_hidden_state[:, -1]
        rewards = duo.reward.score(hidden).float()[:, 0]
        new = candidates[(best.values + rewards / alpha).argmax()][None]
        text = torch.cat([text, new], 1)
        seconds.append(time.perf_counter() - start)
    return text[0, len(prompt) :].tolist(), seconds, num_bytes


def cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
