"""Embedding and classifying texts with a trained model, from Python and from files."""
