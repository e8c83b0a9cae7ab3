"""Pages that users read: their links and the tests that they name. `test_snippets` runs the code.

The code of docs/guide/many_machines.md is run by `integrations`, its arithmetic here.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REPOSITORY = "sklearn-relish/sklearn-relish"
OWN_LINK = re.compile(
    rf"https://(?:github\.com/{REPOSITORY}/(?:blob|tree)|raw\.githubusercontent\.com/{REPOSITORY})"
    r"/main/([^)#\s]+)(?:#([^)\s]+))?"
)
RELATIVE_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
INCLUDED = re.compile(r"```\{include\} (\S+)")
PAGES = [
    path.relative_to(ROOT).as_posix()
    for path in [
        *ROOT.glob("*.md"),
        ROOT / "benchmarks" / "README.md",
        *ROOT.joinpath("docs").glob("*.md"),
        *ROOT.joinpath("docs", "guide").glob("*.md"),
    ]
]
MANY_MACHINES = (ROOT / "docs" / "guide" / "many_machines.md").read_text("utf-8")


def read(path):
    """The text of a page, with the pages that it includes."""
    text = path.read_text("utf-8")
    return INCLUDED.sub(lambda found: read(path.parent / found[1]), text)


def has_section(path, section):
    """Whether a page has a heading with this address."""
    headings = re.findall(r"^#+ (.*)$", read(path), re.MULTILINE)
    addresses = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return section in addresses


def missing(page):
    """The links of a page that lead nowhere in the repository."""
    file = ROOT / page
    text = file.read_text("utf-8")
    links = [(ROOT / target, section) for target, section in OWN_LINK.findall(text)]
    for target, section in RELATIVE_LINK.findall(text):
        if target != "gallery/index.rst":  # made of the examples
            links.append((file.parent / target if target else file, section))
    return [
        f"{path}#{section}"
        for path, section in links
        if not path.exists() or (section and not has_section(path, section))
    ]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_to_files_and_sections(page):
    assert missing(page) == []


def test_links_are_found():
    assert len(OWN_LINK.findall((ROOT / "README.md").read_text("utf-8"))) > 10
    assert len(RELATIVE_LINK.findall((ROOT / "docs/guide/index.md").read_text("utf-8"))) > 10


def test_every_page_of_the_guide_is_in_its_contents():
    contents = (ROOT / "docs" / "guide" / "index.md").read_text("utf-8")
    linked = set(re.findall(r"\((\w+)\.md\)", contents))
    listed = set(re.search(r"```\{toctree\}\n:hidden:\n\n(.*?)```", contents, re.DOTALL)[1].split())
    pages = {path.stem for path in (ROOT / "docs" / "guide").glob("*.md")} - {"index"}
    assert linked == listed == pages


def test_tests_named_in_the_guide_exist():
    guide = (ROOT / "docs" / "guide" / "compatibility.md").read_text("utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", guide)
    assert len(named) > 20
    for file, name in named:
        source = (ROOT / "tests" / "integrations" / file).read_text("utf-8")
        assert not name or f"def {name}(" in source, f"{file}::{name}"


def test_all_code_of_many_machines_is_run():
    run = [
        ("import ray", "LLMEncoder"),  # integrations/test_ray.py
        ("import ray", "RelishRegressor"),
        ("import dask", "LLMEncoder"),  # integrations/test_dask.py
        ("import dask", "RelishRegressor"),
        ("regressor.fit(",),  # integrations/guide.py
        ("PEAK",),  # below
    ]
    blocks = re.findall(r"```python\n(.*?)```", MANY_MACHINES, re.DOTALL)
    matches = [[words for words in run if all(word in code for word in words)] for code in blocks]
    assert [len(found) for found in matches] == [1] * len(run)


def test_the_tables_are_those_that_the_snippet_prints(capsys):
    (snippet,) = re.findall(r"```python\n(PEAK.*?)```", MANY_MACHINES, re.DOTALL)
    exec(snippet, {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    tables = re.findall(r"^\| \d+B \|.*$", MANY_MACHINES, re.MULTILINE)
    assert tables == printed
