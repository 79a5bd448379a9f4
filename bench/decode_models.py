"""The models that the benches of decode run: random-weight Llama shapes of 134 M parameters."""

from __future__ import annotations

import dataclasses

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCAB_SIZE = 32_000


@dataclasses.dataclass(frozen=True)
class Duo:
    """Baseline and reward of one dtype."""

    baseline: LlamaForCausalLM
    reward: LlamaForSequenceClassification

    def to(self, dtype: torch.dtype) -> Duo:
        """Return the same weights in another dtype."""
        copies = []
        for model in (self.baseline, self.reward):
            copy = type(model)(model.config).to(model.device, dtype).eval()
            copy.load_state_dict(model.state_dict())
            copies.append(copy)
        return Duo(*copies)


def random_duo() -> Duo:
    """Build both: hidden size 768, 12 layers of 12 heads, MLP 2,048, vocabulary 32,000, fp32."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=2_048,
        max_position_embeddings=8_192,
        tie_word_embeddings=False,
        num_labels=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(134)
    duo = Duo(LlamaForCausalLM(config).eval(), LlamaForSequenceClassification(config).eval())
    assert sum(parameter.numel() for parameter in duo.baseline.parameters()) == 134_105_856
    return duo


def prompt_of(length: int) -> torch.Tensor:
    """Return random token ids, the same for the same length."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, VOCAB_SIZE, (length,), generator=generator)
