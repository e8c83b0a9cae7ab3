"""``--help`` of every benchmark works without the packages that only benchmarks need."""

import ast
import subprocess
import sys
from pathlib import Path

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.py"))
INSTALLED = {  # with the package itself
    *("numpy", "scipy", "sklearn", "sklearn_relish", "tokenizers", "torch", "transformers"),
}

# One process for all of them: importing torch takes longer than everything else here.
SHOW_HELP = """
import contextlib, io, os, runpy, sys

hidden, *files = sys.argv[1:]
sys.path.insert(0, os.path.dirname(files[0]))
sys.modules |= dict.fromkeys(hidden.split(","))  # importing these raises ModuleNotFoundError
for file in files:
    sys.argv, shown = [file, "--help"], io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        runpy.run_path(file, run_name="__main__")
    print(file, shown.getvalue().startswith("usage: "))
"""


def imported_packages(path):
    """The packages that a file imports at any place."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_help_needs_no_optional_package(tmp_path):
    own = {path.stem for path in BENCHMARKS}
    packages = {name for path in BENCHMARKS for name in imported_packages(path)}
    optional = packages - own - INSTALLED - sys.stdlib_module_names
    assert {"lmdb", "pandas", "matplotlib", "sentence_transformers"} <= optional
    files = [str(path) for path in BENCHMARKS if "add_argument" in path.read_text("utf-8")]
    assert len(files) > 10
    result = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, ",".join(sorted(optional)), *files],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
    )
    assert result.stdout.splitlines() == [f"{file} True" for file in files], result.stderr
