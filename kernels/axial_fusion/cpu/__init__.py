"""How ops run on a CPU, and wherever no kernel takes them: library products in the order that suits a CPU's caches."""
