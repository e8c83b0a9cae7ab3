"""What the README names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tests_that_the_readme_names_are_there():
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", (ROOT / "README.md").read_text())
    assert len(named) > 20
    for file, name in named:
        source = (ROOT / "tests" / "integrations" / file).read_text()
        assert not name or f"def {name}(" in source, f"{file}::{name}"


def test_the_files_that_the_readme_links_are_there():
    for link in re.findall(r"\]\((?!http|#)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link
