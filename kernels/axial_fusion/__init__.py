"""Attention across and within slices, factorised."""
