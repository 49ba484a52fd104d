"""The data pipeline, from files to batches. It uses numpy and grain but not jax: workers never touch an accelerator."""
