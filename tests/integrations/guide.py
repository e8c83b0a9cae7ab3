"""Runs the code of docs/guide/many_machines.md, with two worker processes on this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_model

from sklearn_relish import StateStore

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide" / "many_machines.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
needs_sigkill = pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
N_FILES, N_ROWS = 4, 24
KILL = "pathlib.Path(shared, 'kill').touch()\n"  # a stage that begins so loses a process
BROKEN_FILE, NULL_ROW = "part2.parquet", 5


def block(*words):
    """The one block of the guide that has all of these words."""
    (found,) = [code for code in BLOCKS if all(word in code for word in words)]
    return found


def make_shared(folder):
    """A model, and Parquet data sets: a sound one, one with a null, two with a broken file."""
    shutil.copytree(tiny_model(), folder / "llm")
    for name in ("texts", "null", "broken", "repaired"):
        (folder / name).mkdir()
        for i in range(N_FILES):
            rows = range(i * N_ROWS, (i + 1) * N_ROWS)
            texts = [text_of(row) for row in rows]
            if name == "null" and i == 1:
                texts[NULL_ROW] = None
            table = pa.table({"row": rows, "text": texts, "y": [row % 7 / 2 for row in rows]})
            path = folder / name / f"part{i}.parquet"
            parquet.write_table(table, path, row_group_size=N_ROWS // 2, compression="none")
    break_row_group(folder / "broken" / BROKEN_FILE)
    break_row_group(folder / "repaired" / BROKEN_FILE)


def text_of(row):
    """The text of a row. Each file's first six texts are those of the file before."""
    number = row - 6 if row >= N_ROWS and row % N_ROWS < 6 else row
    return f"text number {number} {'more ' * (number % 5)}".strip()


TEXTS = [text_of(row) for row in range(N_FILES * N_ROWS)]


def break_row_group(path):
    """Overwrite the texts of the second row group of a Parquet file."""
    column = parquet.ParquetFile(path).metadata.row_group(1).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(b"\xff" * column.total_compressed_size)


def run_stages(folder, header, footer, stages, replacements):
    """Run the code of named stages in one new process, and return the error of each stage.

    `/shared` is `folder`. What is logged in a stage is moved to the file `<stage>.log`.
    """
    script = [textwrap.dedent(header), "import traceback, pathlib", f"shared = {str(folder)!r}"]
    for name, code in stages.items():
        for old, new in [*replacements.items(), ("/shared", str(folder))]:
            code = code.replace(old, new)
        code = code.replace("from sklearn_relish import", "from killed_worker import")
        script += [
            "try:",
            textwrap.indent(code, "    "),
            "except BaseException:",
            f"    pathlib.Path(shared, '{name}.error').write_text(traceback.format_exc())",
            "for file in ('log', 'killed'):",
            "    if (path := pathlib.Path(shared, file)).exists():",
            f"        path.rename(path.with_name('{name}.' + file))",
        ]
    script += [textwrap.dedent(footer)]
    path = folder / "script.py"
    main = "if __name__ == '__main__':\n"  # Dask starts workers that import the script
    path.write_text(main + textwrap.indent("\n".join(script), "    "))
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "integrations")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }
    with open(folder / "output", "w") as output:  # a pipe would wait for all child processes
        subprocess.run(
            [sys.executable, str(path)],
            check=False,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            timeout=600,
        )
    print((folder / "output").read_text()[-5000:])
    errors = {path.stem: path.read_text() for path in folder.glob("*.error")}
    print(*errors.values(), sep="\n")
    return errors


def passes(folder, stage):
    """The texts of each pass of a stage, with the id of the process."""
    path = folder / f"{stage}.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def fit(folder, states="states"):
    """Run the guide's code of a fit, with one short head, in this process."""
    code = block("regressor.fit(").replace("/shared/states", f"/shared/{states}")
    few = "max_epochs=1, n_estimators=1, latent_size=16, random_state=0, dtype="
    namespace = {}
    exec(code.replace("/shared", str(folder)).replace("dtype=", few), namespace)
    return namespace["regressor"]


def count_reads(folder, stage):
    """How often each text was read in a stage."""
    return Counter(text for _, texts in passes(folder, stage) for text in texts)


def killed(folder, stage):
    """The process that was killed in a stage, and the texts of its last pass."""
    process, last = json.loads((folder / f"{stage}.killed").read_text())
    return process, last


def assert_read_once(folder):
    """In the stage `reading`, only the texts of a killed process's last pass were read twice."""
    process, last = killed(folder, "reading")
    assert count_reads(folder, "reading") == Counter(set(TEXTS)) + Counter(last)
    n_passes = Counter(pid for pid, _ in passes(folder, "reading"))
    assert n_passes.pop(process) == 3  # it had saved the texts of two passes
    assert n_passes
    (held,) = StateStore(folder / "states").info()
    assert held["n_texts"] == len(set(TEXTS))


def assert_fit_reads_nothing(folder):
    """The guide's fit finds all texts in the store that the stage `reading` has filled."""
    store = StateStore(folder / "states")
    regressor = fit(folder)
    assert (store.hits, store.misses) == (len(set(TEXTS)), 0)
    assert regressor.predict(TEXTS[:1]).shape == (1,)


def assert_scored_once(folder, regressor):
    """Each row is once in the output, though what the killed process had read was read again."""
    process, last = killed(folder, "scoring")
    others = [texts for pid, texts in passes(folder, "scoring") if pid != process]
    assert set(last) <= {text for texts in others for text in texts}
    scores = read_scores(folder / "scores")
    assert scores["row"].to_pylist() == list(range(len(TEXTS)))
    assert scores["text"].to_pylist() == TEXTS
    np.testing.assert_allclose(scores["score"], regressor.predict(TEXTS), rtol=1e-6)


def read_scores(folder):
    """The rows and scores of all files of a folder, in the order of the rows."""
    tables = [parquet.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    return pa.concat_tables(table.select(["row", "text", "score"]) for table in tables).sort_by(
        "row"
    )
