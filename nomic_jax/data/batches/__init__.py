"""Batches as functions of the step."""
