"""Tables as Markdown."""

from aftersam.evaluation.tables import markdown_table


def test_a_table_has_a_header_a_rule_that_aligns_and_its_rows():
    rows = [["organ", "DSC", "note"], ["heart", "0.9", ""]]
    assert markdown_table(rows, left=(0, 2)) == (
        "| organ | DSC | note |\n| --- | ---: | --- |\n| heart | 0.9 |  |"
    )
    assert markdown_table([["", "a"]]) == "|  | a |\n| --- | ---: |"
