"""Hard negatives (``launch.mine``): corpus, candidates, and the choice among them."""
