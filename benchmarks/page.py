"""Pages with a generated part between two markers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aftersam.files import write_text


def write_sections(page: Path, sections: Sequence[str], name: str = "bench") -> None:
    """Put `sections` between the markers `name` of `page`; ValueError unless both are there, once, in order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page} needs one {begin} and, after it, one {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    write_text(page, before + "\n\n".join([begin, *sections, end]) + after)
