"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def markdown_table(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """A Markdown table of `rows`, the first its header; columns in `left` are aligned left, all others right."""
    rule = [" --- |" if column in left else " ---: |" for column in range(len(rows[0]))]
    header, *lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([header, "|" + "".join(rule), *lines])
