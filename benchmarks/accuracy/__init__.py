"""Segmentation accuracy: every system trained and scored alike, what conventions and options change of a score."""
