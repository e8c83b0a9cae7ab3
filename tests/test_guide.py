"""docs/guide/many_machines.md: its arithmetic and its links. `integrations` runs its other code."""

import re
from pathlib import Path

GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "many_machines.md"
TEXT = GUIDE.read_text("utf-8")


def test_the_tables_are_those_that_the_snippet_prints(capsys):
    (snippet,) = re.findall(r"```python\n(PEAK.*?)```", TEXT, re.DOTALL)
    exec(snippet, {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    tables = re.findall(r"^\| \d+B \|.*$", TEXT, re.MULTILINE)
    assert tables == printed


def test_files_and_sections_linked_in_the_guide_exist():
    for path, section in re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", TEXT):
        linked = (GUIDE.parent / path).read_text("utf-8")
        assert f"# {section.replace('-', ' ')}" in linked.lower()
