"""How ops run on a CPU, and wherever no kernel takes them: compiled kernels, optional, and library products."""
