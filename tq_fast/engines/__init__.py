"""Language models by what decoding asks of them: here over a forest, or elsewhere.

base.py     the operations
local.py    a model of this process, over a forest of shared prefixes
"""

from .base import LanguageEngine, Proposal

__all__ = ["LanguageEngine", "Proposal"]
