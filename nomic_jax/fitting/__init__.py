"""Training from Python: ``nomic_jax.fit``, and what it shares with the command ``launch.train``."""
