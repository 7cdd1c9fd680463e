"""Microbenchmarks of the kernels: one subject a file, all on the one harness."""
