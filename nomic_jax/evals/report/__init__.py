"""The scores of a model in a file, and the page that compares models."""
