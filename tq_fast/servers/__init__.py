"""Models that stand behind a URL: a server that speaks the OpenAI API, as vLLM's does.

    server.py      `Server`, how a caller names such a model
    http.py        `Connection`: concurrent requests, tried again while the server stays away
    answers.py     what an answer says, read and checked
    operations.py  `LanguageServer` and `RewardServer`: what decoding asks of a model, as requests
    checks.py      opens them, after finding out by trying that the server answers exactly
    tokenizers.py  the tokenizer on this machine, compared with the server's

Nothing here imports torch: numbers are Python's, log-probs are natural logs.
"""

from .answers import DrawnTokens
from .checks import open_language_server, open_reward_server
from .operations import LanguageServer, RolloutRequest, SamplingLaw
from .rewards import RewardServer
from .server import Server

__all__ = [
    "DrawnTokens",
    "LanguageServer",
    "RewardServer",
    "RolloutRequest",
    "SamplingLaw",
    "Server",
    "open_language_server",
    "open_reward_server",
]
