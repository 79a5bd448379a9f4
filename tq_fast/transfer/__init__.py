"""Transfer Q* (arXiv 2405.20495, Algorithm 1): the loop over tokens, and one step of it."""
