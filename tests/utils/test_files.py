import hashlib
import os

import pytest

from sklearn_relish.utils import files


@pytest.fixture
def large_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sklearn_relish.utils.files.user_cache_path", lambda _: tmp_path / "cache")
    monkeypatch.setattr("sklearn_relish.utils.files.SETTLED_SECONDS", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"a" * files.MIN_CACHED_BYTES)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_digest_of_a_large_file_is_cached(large_file, monkeypatch):
    assert files.file_digest(large_file) == sha256(large_file)
    monkeypatch.setattr(files, "_digest", lambda _: pytest.fail("hashed again"))
    assert files.file_digest(large_file) == sha256(large_file)


def test_a_changed_file_is_hashed_again(large_file):
    files.file_digest(large_file)
    stat = large_file.stat()
    large_file.write_bytes(b"b" * files.MIN_CACHED_BYTES)  # same size
    os.utime(large_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same time of modification
    assert files.file_digest(large_file) == sha256(large_file)


def test_the_digest_of_a_file_that_changed_recently_is_not_cached(large_file, monkeypatch):
    monkeypatch.setattr("sklearn_relish.utils.files.SETTLED_SECONDS", 2.0)
    files.file_digest(large_file)
    assert not (large_file.parent / "cache").exists()


def test_digests_are_right_with_a_damaged_or_unwritable_cache(large_file, tmp_path):
    files.file_digest(large_file)
    (cached,) = (tmp_path / "cache" / "digests").iterdir()
    cached.write_text("cut")
    assert files.file_digest(large_file) == sha256(large_file)
    cached.unlink()
    cached.parent.rmdir()
    cached.parent.write_text("no folder")
    assert files.file_digest(large_file) == sha256(large_file)
