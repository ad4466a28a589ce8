"""Training of the systems that are not ours."""
