"""The README names existing tests and files, by addresses that also work outside the repository."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
REPOSITORY = "sklearn-relish/sklearn-relish"
LINK = re.compile(
    rf"https://(?:github\.com/{REPOSITORY}/blob|raw\.githubusercontent\.com/{REPOSITORY})/main/"
    r"([^)#\s]+)"
)


def test_tests_named_in_the_readme_exist():
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", README)
    assert len(named) > 20
    for file, name in named:
        source = (ROOT / "tests" / "integrations" / file).read_text("utf-8")
        assert not name or f"def {name}(" in source, f"{file}::{name}"


def test_files_linked_in_the_readme_exist():
    linked = LINK.findall(README)
    assert len(linked) > 10
    assert [path for path in linked if not (ROOT / path).exists()] == []


def test_links_in_the_readme_are_absolute():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
