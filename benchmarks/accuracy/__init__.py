"""Segmentation accuracy: the table of systems, and the effect of conventions and of prediction's options on a score."""
