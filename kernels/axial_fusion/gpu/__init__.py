"""How ops run on a GPU: Triton kernels, what launches them, and every tile choice (tiles.py)."""
