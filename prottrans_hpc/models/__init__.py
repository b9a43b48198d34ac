"""The torch modules of the architectures, one file each, and what they share. Knows batches, not corpora."""
