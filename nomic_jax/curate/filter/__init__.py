"""The consistency filter (``launch.filter``): ranks of each pair, and the pairs to keep."""
