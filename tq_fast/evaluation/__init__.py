"""Evaluation: configurations, measures, summaries, pictures and the report."""
