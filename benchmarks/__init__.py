"""harness.py measures, a bench_<subject>.py says what, figure.py draws it and writes the README's table."""
