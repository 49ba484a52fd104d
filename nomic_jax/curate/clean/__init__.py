"""Removes empty, short, duplicate and contaminated rows (``launch.clean``)."""
