"""The corpus: from FASTA to shards, and from shards to ordered, packed samples. Knows residues, not models."""
