"""Build, tests, compute-sanitizer and step times on a GPU: `python -m benchmarks.gpu`."""
