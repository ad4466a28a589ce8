"""Speed and accuracy, measured. speed/ has one file a subject, accuracy/ the table of systems, results/ what was found.

harness.py checks and times a subject's providers by clock.py on the machine that machine.py describes, __main__.py
runs every subject, targets.py holds a result to the aims, compare.py holds two results against each other, figure.py
writes the pages of docs/ and the README's tables, first_contact.py is for new hardware."""
