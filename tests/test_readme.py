"""The README: its addresses also work outside the repository, and its figures are the guide's."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_links_in_the_readme_are_absolute():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert len(targets) > 10
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_figures_of_the_readme_are_those_of_the_guide():
    guide = (ROOT / "docs" / "guide" / "accuracy.md").read_text("utf-8")
    tables = README[README.index("## Accuracy") : README.index("## When not to use it")]
    rows = [line.strip("| ").split(" | ") for line in tables.splitlines() if line.startswith("| ")]
    figures = [row[1:] for row in rows if re.search(r"\d$|\*$", row[-1])]
    assert len(figures) == 10
    by_cells = [line.strip("| ").split(" | ") for line in guide.splitlines()]
    for row in figures:
        assert any(set(row) <= set(cells) for cells in by_cells), row


def test_the_readme_names_the_commands_of_quickstart_and_tests():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    assert any(command.endswith("python examples/quickstart.py") for command in commands)
    assert any(command.endswith("&& pytest --cov -n auto --dist loadfile") for command in commands)
