"""What is computed: one file an op, with its checks, its registered torch op, its gradients and its public function."""
