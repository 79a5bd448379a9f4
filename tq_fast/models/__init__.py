"""Models over a forest: the language models that propose and roll out, and the rewards."""
