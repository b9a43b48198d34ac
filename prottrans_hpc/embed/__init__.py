"""Embeddings: proteins through a trained model into one HDF5 file, in the order of the input."""
