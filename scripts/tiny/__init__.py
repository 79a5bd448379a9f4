"""Steps of ``scripts/train_tiny_models.py``: corpus, training, measuring, card."""
