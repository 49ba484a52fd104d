"""Scores of a model. A model is a function ``embed(texts, prompt)``."""
