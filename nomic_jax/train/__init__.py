"""Training: settings, objectives, the step, the loop, and what watches a run."""
