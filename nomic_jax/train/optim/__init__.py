"""The optimizer, its schedule, and the moving average of the weights."""

from nomic_jax.train.optim.adamw import decay_mask, learning_rate, make_optimizer

__all__ = ["decay_mask", "learning_rate", "make_optimizer"]
