"""The README's tables are those that the tests prove."""

import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("tables_of_readme", TESTS / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_readme_has_the_table_that_the_rows_make(name):
    found = tables.written(name, tables.README.read_text("utf-8"))
    if found is None:
        pytest.skip(f"the README has no markers for {name}")
    assert found == tables.made(name), f"run: python tests/tables.py {name} --write"


def test_a_table_is_put_between_its_markers_and_nowhere_else():
    text = "above\n<!-- zoo -->\nold\n<!-- /zoo -->\nbelow\n"
    new = tables.write("zoo", text)
    assert new == f"above\n<!-- zoo -->\n{tables.made('zoo')}<!-- /zoo -->\nbelow\n"
    assert tables.write("zoo", new) == new


def test_a_readme_without_markers_is_left_alone():
    with pytest.raises(SystemExit, match="no <!-- zoo -->"):
        tables.write("zoo", "nothing\n")


def test_no_cell_ends_early():
    assert tables.markdown(("a", "b"), [("x | y", "z")])[2] == "| x &#124; y | z |"
