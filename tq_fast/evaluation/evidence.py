"""Rewards over real text in which foresight pays, for the recipe `real` (extra `evidence`).

Both read prompts of the form that `scripts/make_evidence_prompts.py` writes,

    Write <description>. Use three or four sentences and all of these words: <words>.

as text or as chat messages, and both lie in [0, 1]:

    required_words   r = share(y) * fresh(x, y)
    topic_closeness  r = max(0, cos(e(y), e(description))) * fresh(x, y) * min(1, words(y) / 40)

- share(y): the part of the required words that y contains as whole words, case and regular
  inflections ignored (`inflections`). An occurrence counts only where at least two words that are
  not required stand between it and the required word before it, and none of a list counts but its
  first: a list of the words, the one in the prompt copied, say, earns one of them.
- fresh(x, y): the part of the word 4-grams of y that stand neither earlier in y nor in the prompt
  x. A text that repeats itself, or its prompt, is worth so much less. Ordinary texts have 0.95 to 1.
- e: mean of all-MiniLM-L6-v2's last states; the description holds tone, kind and topic of the text.
- words(y) / 40: the prompt asks for several sentences, and a few key words alone are close to any
  description that consists of them.

Both are functions of the text alone: no randomness, no state but a cache of embeddings.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..errors import InvalidArgument
from .models import MeanEmbedder, load_embedder
