"""What the compilers made of the kernels: `python -m benchmarks.codegen`."""
