"""What makes ``Embedder`` a drop-in for sentence-transformers' SentenceTransformer: its names, and what they return.

No module here imports sentence-transformers. ``names`` is the table of what is supported and what is refused.
"""
