"""Draw one token a row from its logits, reweighted by a value that is linear in token embeddings.

    x = logits[:, :vocab_size]                                   the prior
    q = directions . token_embeddings^T / alpha                  the value of every token
    y = (x + q) / temperature, top-k first, then top-p           the law that is drawn from
    id = first token id whose running mass of softmax(y) exceeds u * total
    prior_logprobs = log_softmax(x)[id],  guided_logprobs = log_softmax(y over what was kept)[id]
    kl = sum over z of law(z) * (log law(z) - log_softmax(x)[z])

u is one Philox uniform a row, of the stream of sample_tokens: directions of 0 draw what it draws.
Bytes: the token embeddings are read once for all rows, `V * r * itemsize`, and the logits once to
twice, `N * V * itemsize`; the kernels hold no `[N, V]` of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import _checks, philox
from ._checks import PerRow
from ._dispatch import Backend, Op, native_function, python_function
from .sample_tokens import check_sampler, kept_logits, sample_tokens_ref
from .topk_logprobs import clean_logits


class ValueSampledTokens(NamedTuple):
    """`ids` int64, `prior_logprobs`, `guided_logprobs` and `kl` fp32, `valid` bool: `[N]`."""

    ids: Tensor
    prior_logprobs: Tensor
    guided_logprobs: Tensor
    kl: Tensor
    valid: Tensor


def value_sample_tokens(
    logits: Tensor,
    directions: Tensor,
    token_embeddings: Tensor,
    keys: Tensor,
    step: int | Tensor,
    *,
    alpha: PerRow = 1.0,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    greedy: bool = False,
    seed: int | Tensor = 0,
    vocab_size: int | None = None,
    backend: str | None = None,
) -> ValueSampledTokens:
    """`torch.multinomial(softmax(logits + directions @ token_embeddings.T / alpha), 1)`.

    Eq. 5 of Transfer Q* (arXiv 2405.20495), log prior + Q / alpha, over the whole vocabulary, for a
    Q(x, z) = v(x) + directions(x) . token_embeddings(z), of which v cancels.

    Args:
        logits: `[N, V]`, floating point; NaN counts as -inf.
        directions: `[N, r]`, floating point, in units of the reward.
        token_embeddings: `[V, r]` or more rows, floating point; those from vocab_size on are
            padding.
        keys: int64 `[N]`, the key of each row's random draw.
        step: int, or a one-element integer tensor.
        alpha: decoding temperature, above 0, in units of the reward. A number or `[N]`.
        temperature: of the reweighted law, at least 0; 0, in fp32, is arg max. A number or `[N]`.
        top_k: keep the k largest (ties: lower id first), before top_p; 0 keeps all. Or `[N]`.
        top_p: then keep the smallest set, from the most likely down, whose share of the mass
            that top_k left is at least top_p; always at least one token. A number or `[N]`.
        greedy: arg max of `logits + q`, the lowest id on ties, whatever the temperature.
        seed: any int64, or a one-element int64 tensor.
        vocab_size: columns of logits from here on are padding and take no part.
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Returns:
        ValueSampledTokens. prior_logprobs is the log-probability of the logits alone, at
        temperature 1 over the whole vocabulary; guided_logprobs is the log-density drawn from, 0
        for an arg max; kl, at least 0, is that law's divergence from the prior in nats. A row has
        valid False, id 0, both log-probs -inf and kl 0 where it has no finite logit, a logit or a
        sum of +inf, or a value that is not finite at a token whose logit is.

    Raises:
        InvalidArgument: wrong shapes, dtypes or parameters, or an input with grad.
        BackendRefused: the pinned backend does not take these inputs.
    """
    tensors = (logits, directions, token_embeddings, keys, step)
    parameters: dict[str, Any] = {
        "alpha": alpha,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "greedy": greedy,
        "seed": seed,
        "vocab_size": vocab_size,
    }
    _check(*tensors, **parameters)
    return ValueSampledTokens._make(_OP(backend, *tensors, **parameters))


def _check(
    logits: Tensor,
    directions: Tensor,
    token_embeddings: Tensor,
    keys: Tensor,
    step: int | Tensor,
    *,
    alpha: PerRow,
    greedy: bool,
    vocab_size: int | None,
    **sampler: Any,
) -> None:
    name = "value_sample_tokens"
    values = {"directions": directions, "token_embeddings": token_embeddings}
    _checks.require_tensors(name, logits=logits, **values, keys=keys)
    check_sampler(name, logits, keys, step, vocab_size=vocab_size, **sampler)
    for argument, tensor in values.items():
        _checks.require_float(name, argument, tensor)
    _checks.refuse_grad(name, **values)
    _checks.require_dim(name, "directions", directions, 2, "[N, r]")
    rank = directions.shape[1]
    _checks.require_shape(name, "directions", directions, (logits.shape[0], rank), "[N, r]")
    _checks.require_dim(name, "token_embeddings", token_embeddings, 2, "[V, r]")
    rows = token_embeddings.shape[0]
    _checks.require_shape(name, "token_embeddings", token_embeddings, (rows, rank), "[V, r]")
    width = logits.shape[-1] if vocab_size is None else vocab_size
    if rows < width:
        raise InvalidArgument(
            f"{name}: token_embeddings has shape {list(token_embeddings.shape)}, expected at least "
            f"{width} rows, one for each token of the vocabulary"
        )
    _checks.require_per_row(name, "alpha", alpha, logits, _checks.SMALLEST, _checks.LARGEST)
    if not isinstance(greedy, bool):
        raise InvalidArgument(
            f"{name}: greedy is {_checks.describe(greedy)}, expected True or False"
        )


def value_sample_tokens_ref(
    logits: Tensor,
    directions: Tensor,
    token_embeddings: Tensor,
    keys: Tensor,
    step: int | Tensor,
    *,
    alpha: PerRow = 1.0,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    greedy: bool = False,
    seed: int | Tensor = 0,
    vocab_size: int | None = None,
) -> ValueSampledTokens:
    """The reference of `value_sample_tokens`: plain PyTorch, fp32 logits, fp64 sums."""
    prior = clean_logits(logits, vocab_size)
    embeddings = token_embeddings[: prior.shape[-1]].to(torch.float64)
    # Rounded from fp64, a product has the same bits whatever the number of rows.
    products = directions.to(torch.float64) @ embeddings.T
    q = (products / _checks.as_column(alpha, torch.float64)).to(torch.float32)
    # A value counts where its token can be drawn.
    allowed = prior > -torch.inf
    is_finite = (q.isfinite() | ~allowed).all(dim=-1, keepdim=True)
    guided = torch.where(allowed & is_finite, prior + q, -torch.inf)
    heat = 0.0 if greedy else temperature
    drawn = sample_tokens_ref(
        guided, keys, step, temperature=heat, top_k=top_k, top_p=top_p, seed=seed
    )
    prior_laws = prior.to(torch.float64).log_softmax(dim=-1)
    prior_logprobs = prior_laws.gather(-1, drawn.ids.unsqueeze(-1)).squeeze(-1).to(torch.float32)
    kl = -prior_logprobs
    if isinstance(heat, Tensor):
        heats = heat.to(torch.float32).unsqueeze(-1)
        law = kept_logits(guided, torch.where(heats == 0.0, 1.0, heats), top_k, top_p)
        kl = torch.where(heats.squeeze(-1) == 0.0, kl, _divergence(law, prior_laws))
    elif heat >= _checks.SMALLEST:
        kl = _divergence(kept_logits(guided, heat, top_k, top_p), prior_laws)
    return ValueSampledTokens(
        drawn.ids,
        torch.where(drawn.valid, prior_logprobs, -torch.inf),
        drawn.proposal_logprobs,
        torch.where(drawn.valid, kl.clamp(min=0.0), 0.0),
        drawn.valid,
    )


def _divergence(guided: Tensor, prior_laws: Tensor) -> Tensor:
    """KL(softmax(guided) || prior) `[N]` in fp32, from logits and log-probabilities `[N, V]`."""
    law = guided.to(torch.float64).log_softmax(dim=-1)
    terms = torch.where(law == -torch.inf, 0.0, law.exp() * (law - prior_laws))
    return terms.sum(dim=-1).to(torch.float32)


def value_sample_tokens_native(
    logits: Tensor,
    directions: Tensor,
    token_embeddings: Tensor,
    keys: Tensor,
    step: int | Tensor,
    *,
    alpha: PerRow = 1.0,
    temperature: PerRow = 1.0,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    greedy: bool = False,
    seed: int | Tensor = 0,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The C++ kernel, with the arguments of the reference."""
    return torch.ops.tq_fast.value_sample_tokens.default(
        logits,
        directions,
        token_embeddings,
        keys,
        *philox.split_int64(step),
        *_checks.split_per_row(alpha),
        *_checks.split_per_row(temperature),
        *_checks.split_per_row(top_k),
        *_checks.split_per_row(top_p),
        greedy,
        logits.size(-1) if vocab_size is None else vocab_size,
        *philox.split_int64(seed),
    )


def _fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    ids = logits.new_empty((rows,), dtype=torch.int64)
    prior_logprobs, guided_logprobs, kl = (
        logits.new_empty((rows,), dtype=torch.float32) for _ in range(3)
    )
    return ids, prior_logprobs, guided_logprobs, kl, logits.new_empty((rows,), dtype=torch.bool)


def _refuse_cpu(
    logits: Tensor,
    directions: Tensor,
    token_embeddings: Tensor,
    *arguments: Any,
    **parameters: Any,
) -> str | None:
    return _checks.refuse_float64(
        logits=logits, directions=directions, token_embeddings=token_embeddings
    )


def _refuse_triton(
    logits: Tensor,
    directions: Tensor,
    token_embeddings: Tensor,
    *arguments: Any,
    top_k: PerRow = 0,
    top_p: PerRow = 1.0,
    **parameters: Any,
) -> str | None:
    if isinstance(top_k, Tensor) or top_k != 0 or isinstance(top_p, Tensor) or top_p < 1.0:
        return "top_k or top_p is given; the kernel draws from the whole vocabulary"
    others = {"directions": directions, "token_embeddings": token_embeddings}
    names = dict(zip(("keys", "step"), arguments, strict=False))
    return _checks.refuse_float64(logits=logits, **others) or _checks.refuse_other_device(
        logits, **others, **names, **parameters
    )


_OP = Op(
    "value_sample_tokens",
    value_sample_tokens_ref,
    Backend(
        "triton",
        python_function("tq_fast.kernels.value_sample_tokens", "value_sample_tokens_triton"),
        _refuse_triton,
    ),
    Backend(
        "cpu",
        native_function("value_sample_tokens", value_sample_tokens_native, _fake),
        _refuse_cpu,
    ),
)
