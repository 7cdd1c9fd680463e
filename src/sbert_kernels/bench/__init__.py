"""What ``python -m sbert_kernels bench`` measures: one subject a file, all with the same timer and report."""
