"""From files to batches: numpy and grain, no jax, so that workers never touch an accelerator."""
