"""`ValueHead`: the value Q_V of a next token, read off the prior's hidden state.

    Q_V(x, z) = v(f(h)) + u(f(h)) . e_z

h is what the prior's LM head reads after the text x, f a small MLP, e_z a vector for each token.
v cancels where tokens are compared: it is the value of the text, a judge and a diagnostic.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import InvalidArgument

_FORMAT = "tq_fast.ValueHead 1"


@dataclasses.dataclass(frozen=True)
class ValueHeadConfig:
    """What a head is made for, and how well it fitted.

    Attributes:
        hidden_size: D, of the states that it reads.
        vocab_size: tokens that it has a vector for.
        width: of the two layers of f.
        rank: r, numbers of a token's vector.
        reward_states: whether it reads the reward model's states behind the prior's.
        models: fingerprint of each model that it belongs to, by role: "prior", and with
            `reward_states` "reward", must be the same wherever the head is used.
        fit: how it was fitted, and what held-out prompts say about it.
    """

    hidden_size: int
    vocab_size: int
    width: int = 256
    rank: int = 64
    reward_states: bool = False
    models: dict[str, str] = dataclasses.field(default_factory=dict)
    fit: dict[str, Any] = dataclasses.field(default_factory=dict)


class ValueHead(nn.Module):
    """The head; everything in it is fp32.

    Args:
        config: sizes, and what it belongs to.

    Attributes:
        token_embeddings: e_z `[V, r]`.
    """

    def __init__(self, config: ValueHeadConfig) -> None:
        super().__init__()
        self.config = config
        layer: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        self.trunk = nn.Sequential(
            nn.Linear(config.hidden_size, config.width, **layer),
            nn.SiLU(),
            nn.Linear(config.width, config.width, **layer),
            nn.SiLU(),
        )
        self.value = nn.Linear(config.width, 1, **layer)
        self.direction = nn.Linear(config.width, config.rank, **layer)
        self.token_embeddings = nn.Parameter(torch.zeros(config.vocab_size, config.rank, **layer))
        # States are brought to mean 0 and deviation 1, rewards back from it.
        self.hidden_mean: torch.Tensor
        self.hidden_scale: torch.Tensor
        self.reward_mean: torch.Tensor
        self.reward_scale: torch.Tensor
        self.register_buffer("hidden_mean", torch.zeros(config.hidden_size, **layer))
        self.register_buffer("hidden_scale", torch.ones(config.hidden_size, **layer))
        self.register_buffer("reward_mean", torch.zeros((), **layer))
        self.register_buffer("reward_scale", torch.ones((), **layer))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values v `[N]` and directions u `[N, r]` in units of the reward, fp32.

        Args:
            hidden: states `[N, D]` of any floating-point dtype.
        """
        features = self.trunk((hidden.float() - self.hidden_mean) / self.hidden_scale)
        values = self.value(features).squeeze(-1) * self.reward_scale + self.reward_mean
        return values, self.direction(features) * self.reward_scale

    def q(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Return Q_V `[N]` of the tokens `token_ids` (int64 `[N]`) after the states `[N, D]`."""
        values, directions = self(hidden)
        return values + (directions * self.token_embeddings[token_ids]).sum(-1)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors` into `folder`."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.detach().contiguous() for name, weight in self.state_dict().items()}
        save_file(weights, path / "model.safetensors")
        described = {"format": _FORMAT, **dataclasses.asdict(self.config)}
        text = json.dumps(described, indent=2, ensure_ascii=False, allow_nan=False)
        (path / "config.json").write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> ValueHead:
        """Return the head that `save` wrote.

        Raises:
            InvalidArgument: there is none in `folder`, or it is damaged.
        """
        path = Path(folder)
        try:
            described = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if described.pop("format", None) != _FORMAT:
                raise ValueError("config.json is not that of a value head")
            head = ValueHead(ValueHeadConfig(**described))
            head.load_state_dict(load_file(path / "model.safetensors"))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidArgument(
                f"value must be a ValueHead or a folder that ValueHead.save wrote, got "
                f"{os.fspath(folder)!r}: {reason}"
            ) from error
        return head.eval().requires_grad_(False)
