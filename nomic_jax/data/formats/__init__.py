"""Rows of files in every format, and files that appear complete or not at all."""
