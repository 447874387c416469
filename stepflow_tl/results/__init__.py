"""What every stored result shares: files, provenance, text tables."""
