"""The code of docs/many_machines.md with real Ray: two actors, one of which is killed."""

import shutil
import tempfile

import pytest

pytest.importorskip("ray")
pytest.importorskip("pyarrow")

import guide
from guide import KILL, N_FILES, N_ROWS, block

HEADER = """
import ray
ray.init(num_cpus=3, object_store_memory=80 * 2**20, include_dashboard=False, _temp_dir=TEMP)
ray.data.DataContext.get_current().target_min_block_size = 1  # files are not read together
"""
STAGES = {
    "reading": KILL + block("import ray", "LLMEncoder"),
    "scoring": KILL + block("import ray", "RelishRegressor"),
}
REPLACEMENTS = {
    "size=8": "size=2",
    "num_gpus=1": "num_cpus=1",
    "4096": str(N_ROWS),
    '/texts")': f'/texts", override_num_blocks={N_FILES})',
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder in which the guide's code has run, and the regressor that it has used."""
    folder = tmp_path_factory.mktemp("shared")
    guide.make_shared(folder)
    regressor = guide.fit(folder, states="own_states")
    temp = tempfile.mkdtemp(prefix="ray")  # tmp_path is too long for the paths of Ray's sockets
    try:
        header = HEADER.replace("TEMP", repr(temp))
        errors = guide.run_stages(folder, header, "ray.shutdown()", STAGES, REPLACEMENTS)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    assert errors == {}
    return folder, regressor


def test_reading_into_a_store(shared):
    folder, _ = shared
    guide.assert_read_once(folder)
    guide.assert_fit_reads_nothing(folder)


def test_scoring(shared):
    guide.assert_scored_once(*shared)
