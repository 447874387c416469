"""What every stored result shares: the base class, files, provenance, text tables."""
