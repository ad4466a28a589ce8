"""harness.py measures, bench_<subject>.py says what, __main__.py runs them all; figure.py draws and writes the
README's tables, compare.py holds two results against each other, first_contact.py is for new hardware."""
