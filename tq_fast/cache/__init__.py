"""The shared-prefix KV cache and its attention function for transformers."""

from .attention import forest_attention
from .forest import ForestCache

__all__ = ["ForestCache", "forest_attention"]
