"""Texts to token ids, once, in memory-mapped stores."""
