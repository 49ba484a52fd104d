"""Curation of training data: numpy and faiss. The encoder is passed in as a function."""
