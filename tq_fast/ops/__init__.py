"""The ops: one file each, with the public function and its PyTorch reference.

Axis letters: N rows, G trees, T new tokens, P prefix, S branch tokens, H_q and H_kv heads, d head
size, V vocabulary, D hidden, r columns of a token's value, k candidates, n roll-outs. All
logarithms are natural.
"""

from ._dispatch import describe_backends
from .advance_rollouts import advance_rollouts_, advance_rollouts_ref
from .few_rows_linear import few_rows_linear, few_rows_linear_ref
from .finish_decoder_layer import finish_decoder_layer, finish_decoder_layer_ref
from .linear_trajectory_logprob import linear_trajectory_logprob, linear_trajectory_logprob_ref
from .merge_attention_states import (
    AttentionState,
    merge_attention_states,
    merge_attention_states_ref,
)
from .project_qkv import QueriesKeysValues, project_qkv, project_qkv_ref
from .reweight_sample import ReweightedSample, reweight_sample, reweight_sample_ref
from .sample_tokens import SampledTokens, sample_tokens, sample_tokens_ref
from .shared_prefix_attention import shared_prefix_attention, shared_prefix_attention_ref
from .topk_logprobs import TopKLogprobs, topk_logprobs, topk_logprobs_ref
from .trajectory_log_ratio import trajectory_log_ratio, trajectory_log_ratio_ref
from .value_sample_tokens import (
    ValueSampledTokens,
    value_sample_tokens,
    value_sample_tokens_ref,
)

__all__ = [
    "AttentionState",
    "QueriesKeysValues",
    "ReweightedSample",
    "SampledTokens",
    "TopKLogprobs",
    "ValueSampledTokens",
    "advance_rollouts_",
    "advance_rollouts_ref",
    "describe_backends",
    "few_rows_linear",
    "few_rows_linear_ref",
    "finish_decoder_layer",
    "finish_decoder_layer_ref",
    "linear_trajectory_logprob",
    "linear_trajectory_logprob_ref",
    "merge_attention_states",
    "merge_attention_states_ref",
    "project_qkv",
    "project_qkv_ref",
    "reweight_sample",
    "reweight_sample_ref",
    "sample_tokens",
    "sample_tokens_ref",
    "shared_prefix_attention",
    "shared_prefix_attention_ref",
    "topk_logprobs",
    "topk_logprobs_ref",
    "trajectory_log_ratio",
    "trajectory_log_ratio_ref",
    "value_sample_tokens",
    "value_sample_tokens_ref",
]
