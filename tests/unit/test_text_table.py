"""Plain tables: alignment, folding, Markdown."""

from lccost.text_table import Column, markdown, plain

COLUMNS = (Column(title="method", folds=True), Column(title="peak\nGiB", is_number=True))


def test_numbers_stand_right_and_titles_at_the_bottom() -> None:
    assert plain(COLUMNS, [("full", "17.1"), ("kivi", "6")], 80) == (
        "         peak\nmethod    GiB\n─────────────\nfull     17.1\nkivi        6\n"
    )


def test_a_column_that_folds_gives_way_and_loses_nothing() -> None:
    name = "snapkv:keep_tokens=2048+kivi:bits=2"
    text = plain(COLUMNS, [(name, "1")], 30)
    assert max(len(line) for line in text.splitlines()) <= 30
    assert "".join(line[:23].strip() for line in text.splitlines()[3:]) == name


def test_markdown_escapes_and_keeps_one_line_a_row() -> None:
    lines = markdown(COLUMNS, [("a|b", "1\n+ 2")]).splitlines()
    assert lines[0] == "| method | peak GiB |"
    assert lines[1] == "|--------|---------:|"
    assert lines[2] == "| a\\|b   |    1 + 2 |"
