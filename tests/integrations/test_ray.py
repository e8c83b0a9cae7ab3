"""The code of docs/guide/many_machines.md with real Ray: two actors, one of which is killed."""

import shutil
import tempfile

import guide
import pytest
from guide import KILL, N_FILES, N_ROWS, block

pytest.importorskip("ray")
pytestmark = guide.needs_sigkill

HEADER = """
import os
os.environ["RAY_DATA_USE_DATASOURCE_V2"] = "0"  # it reads small files together, for one actor
os.environ["RAY_worker_niceness"] = "0"  # with Ray's 15, actors wait for the other tests
import ray
ray.init(num_cpus=3, object_store_memory=80 * 2**20, include_dashboard=False, _temp_dir=TEMP)
ray.data.DataContext.get_current().wait_for_min_actors_s = 300  # else one may do all the work
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
    temp = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # paths of Ray's sockets must be short
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
