"""What compiled kernels cost, counted without a GPU: instructions, registers, memory, and the bounds they set."""
