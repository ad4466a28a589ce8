"""A page changes between its markers alone."""

import pytest

from benchmarks.page import write_sections

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def test_the_readme_changes_between_its_markers_alone(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_sections(readme, ["| table |", "![figure](docs/x.png)"])
    once = readme.read_text()
    assert once.startswith(f"before\n{BEGIN}\n\n| table |\n\n![figure](docs/x.png)\n\n{END}\nafter\n")
    write_sections(readme, ["| table |", "![figure](docs/x.png)"])
    assert readme.read_text() == once
    readme.write_text(f"{END} {BEGIN}")
    with pytest.raises(ValueError, match=r"README\.md needs one <!-- bench:begin -->"):
        write_sections(readme, ["x"])


def test_sections_go_between_the_markers_of_their_name(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\nfirst\n{END}\n<!-- other:begin -->\n<!-- other:end -->\n")
    write_sections(page, ["second"], "other")
    assert (
        page.read_text() == f"{BEGIN}\nfirst\n{END}\n<!-- other:begin -->\n\nsecond\n\n<!-- other:end -->\n"
    )
