"""How one task is scored: retrieval, STS, classification, clustering."""
