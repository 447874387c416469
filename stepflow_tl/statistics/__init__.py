"""Effect sizes, intervals and tests over groups and pairs of traces."""
