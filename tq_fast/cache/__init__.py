"""The shared-prefix KV cache and its attention function for transformers."""

from .attention import forest_attention
from .forest import ForestCache, SavedTokens

__all__ = ["ForestCache", "SavedTokens", "forest_attention"]
