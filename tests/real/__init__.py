"""Tests on the weights of a real model, SmolLM2-135M-Instruct; `make real` runs them."""
