"""The code of docs/guide/many_machines.md with real Dask: two processes, one of which is killed."""

from collections import Counter

import guide
import pytest
from guide import KILL, block, parquet

pytest.importorskip("distributed")
pytest.importorskip("dask.dataframe")
pytestmark = guide.needs_sigkill

LOCAL = "Client(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=':0')"
HEADER = f"""
import dask
from dask.distributed import Client
from distributed.utils import get_mp_context
dask.config.set({{"distributed.worker.multiprocessing-method": "forkserver"}})
# Workers start as forks of a process that has imported this, which takes most of a start.
get_mp_context().set_forkserver_preload(
    ["distributed", "dask.dataframe", "killed_worker", "transformers.models.llama.modeling_llama"]
)
local = {LOCAL}
"""
READ, SCORE = block("import dask", "LLMEncoder"), block("import dask", "RelishRegressor")
READ_BROKEN = READ.replace("/texts", "/repaired").replace("/states", "/repaired_states")
REPAIR = f"""
import shutil
shutil.copy(shared + "/texts/{guide.BROKEN_FILE}", shared + "/repaired/{guide.BROKEN_FILE}")
"""
STAGES = {
    "reading": KILL + READ,
    "scoring": KILL + SCORE,
    "interrupted": READ_BROKEN,
    "repaired": REPAIR + READ_BROKEN,
    # Tasks of these may still run when their error arrives.
    "null": SCORE.replace("/texts", "/null").replace("/scores", "/null_scores"),
    "broken": SCORE.replace("/texts", "/broken").replace("/scores", "/broken_scores"),
}
REPLACEMENTS = {'Client("scheduler:8786")': "local"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder in which the guide's code has run, the regressor that it has used, and errors."""
    folder = tmp_path_factory.mktemp("shared")
    guide.make_shared(folder)
    regressor = guide.fit(folder, states="own_states")
    errors = guide.run_stages(folder, HEADER, "local.shutdown()", STAGES, REPLACEMENTS)
    return folder, regressor, errors


def test_reading_into_a_store(shared):
    folder, _, errors = shared
    assert "reading" not in errors
    guide.assert_read_once(folder)
    guide.assert_fit_reads_nothing(folder)


def test_scoring(shared):
    folder, regressor, errors = shared
    assert "scoring" not in errors
    guide.assert_scored_once(folder, regressor)


def test_a_missing_text_is_named(shared):
    _, _, errors = shared
    assert f"X has missing texts in row {guide.NULL_ROW}: drop these rows" in errors["null"]


def test_a_broken_file_is_an_error_and_no_part_of_its_scores_is_written(shared):
    folder, _, errors = shared
    assert "Couldn't deserialize thrift" in errors["broken"]
    written = list((folder / "broken_scores").glob("*.parquet"))
    assert len(written) < guide.N_FILES
    assert {parquet.read_metadata(path).num_rows for path in written} <= {guide.N_ROWS}


def test_after_a_broken_file_is_repaired_only_the_rest_is_read(shared):
    folder, _, errors = shared
    assert "Couldn't deserialize thrift" in errors["interrupted"]
    assert "repaired" not in errors
    counts = guide.count_reads(folder, "interrupted") + guide.count_reads(folder, "repaired")
    assert counts == Counter(set(guide.TEXTS))
