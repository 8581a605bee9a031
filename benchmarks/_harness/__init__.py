"""What the benchmarks share: cases, optimizers, timing, tables, results on disk."""
