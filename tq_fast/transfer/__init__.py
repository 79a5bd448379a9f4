"""Transfer Q*: one token of every prompt (arXiv 2405.20495, Algorithm 1)."""
