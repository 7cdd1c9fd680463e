"""What is computed: one file an operation, with its formula, its autograd Function and its public function."""
