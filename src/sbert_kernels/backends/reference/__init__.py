"""The definition of each operation in eager torch, for reading and for fp64: the ground truth of the others."""
