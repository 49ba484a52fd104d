"""The losses of embeddings and of the vocabulary, as sums over a device's rows, and their settings."""
