"""The shared-prefix KV cache and its attention function for transformers."""

from .attention import forest_attention
from .cache import ForestCache, SavedTokens
from .prefixes import common_length, share_prefix

__all__ = ["ForestCache", "SavedTokens", "common_length", "forest_attention", "share_prefix"]
