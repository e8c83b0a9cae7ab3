"""Every block of Python code of the README and of the documentation runs, with a tiny model."""

import logging
import re
from pathlib import Path

import joblib
import pandas as pd
import pytest
from documented import add_tiny_model, run_as_documented

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
ELSEWHERE = "docs/guide/many_machines.md"  # test_guide.py and integrations run its code
PAGES = [
    page
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if (page := path.relative_to(ROOT).as_posix()) != ELSEWHERE
    and FENCE.search(path.read_text("utf-8"))
]
NEEDED = {"dask.distributed": "distributed", "datasets": "datasets", "sklearn.callback": "rich"}
WORDS = ["awful", "poor", "fair", "good", "superb"]
N_TEXTS = 60


def blocks(page):
    """The blocks of a page, with the numbers of their lines for tracebacks."""
    text = (ROOT / page).read_text("utf-8")
    for found in FENCE.finditer(text):
        yield "\n" * (text.count("\n", 0, found.start()) + 1) + found[1]


@pytest.fixture
def namespace(tmp_path, monkeypatch):
    """The names that the guide uses without defining them."""
    pytest.importorskip("matplotlib.pyplot").switch_backend("agg")
    add_tiny_model(tmp_path)
    run_as_documented(tmp_path, monkeypatch)
    texts = [f"{WORDS[i % 5]} film {i}" for i in range(N_TEXTS)]
    y = [1.0 + i % 5 for i in range(N_TEXTS)]
    titles = [f"Film {i}" for i in range(N_TEXTS)]
    films = pd.DataFrame({"title": titles, "review": texts, "score": y})
    films.to_csv("films.csv", index=False)
    yield {"texts": texts, "y": y, "new_texts": ["a good film", "a poor film"]}
    logging.getLogger("sklearn_relish").setLevel(logging.NOTSET)


def test_the_pages_with_code_are_found():
    assert {"README.md", "docs/index.md", "docs/guide/serving.md"} <= set(PAGES)
    assert len(PAGES) > 10


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page, namespace, tmp_path):
    for code in blocks(page):
        for module, package in NEEDED.items():
            if module in code:
                pytest.importorskip(package)
        # A cluster in this process, and threads in the place of processes, start faster.
        code = code.replace("/shared", tmp_path.as_posix())
        code = code.replace('"scheduler:8786"', "processes=False, dashboard_address=None")
        with joblib.parallel_config(backend="threading"):
            exec(compile(code, str(ROOT / page), "exec"), namespace)
    if "client" in namespace:
        namespace["client"].close()
