import os
import signal
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow.parquet import write_table
from safetensors.torch import save_file

from tercet.errors import RecipeError, StorageError
from tercet.files import atomic as files
from tercet.files.atomic import recover_folder, replacing_file, replacing_folder, sole_writer
from tests.toy import small_disk


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.fixture
def folder(tmp_path):
    """A folder with an old content."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").write_text("old")
    return tmp_path / "model"


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refuse(*_):
    raise OSError(28, "No space left on device")


def test_a_folder_is_replaced_as_a_whole_and_nothing_else_stays(folder):
    with replacing_folder(folder) as fresh:
        (fresh / "new").write_text("new")
        assert names(folder) == ["old"]
    assert names(folder) == ["new"] and names(folder.parent) == ["model"]


def test_parents_are_made(tmp_path):
    with replacing_folder(tmp_path / "a/b") as fresh:
        (fresh / "new").write_text("new")
    with replacing_file(tmp_path / "c/d.txt") as fresh:
        fresh.write_text("new")
    assert names(tmp_path / "a/b") == ["new"] and names(tmp_path / "c") == ["d.txt"]


def test_a_body_that_fails_leaves_what_was_there(folder):
    with pytest.raises(ValueError), replacing_folder(folder) as fresh:
        (fresh / "new").write_text("half")
        raise ValueError
    with pytest.raises(ValueError), replacing_file(folder / "old") as fresh:
        fresh.write_text("half")
        raise ValueError
    assert names(folder.parent) == ["model"] and names(folder) == ["old"]
    assert (folder / "old").read_text() == "old"


def test_a_full_disk_is_a_storage_error_and_leaves_what_was_there(folder, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="model: could not be written: No space left"):
        with replacing_folder(folder) as fresh:
            (fresh / "new").write_text("new")
    with pytest.raises(StorageError, match="old: could not be written: No space left"):
        with replacing_file(folder / "old") as fresh:
            fresh.write_text("new")
    assert names(folder.parent) == ["model"] and names(folder) == ["old"]
    assert (folder / "old").read_text() == "old"


def test_a_refused_second_rename_takes_the_old_folder_back(folder, monkeypatch):
    rename = Path.rename

    def refusing(path, target):
        return refuse() if ".new-" in path.name else rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    with pytest.raises(StorageError), replacing_folder(folder) as fresh:
        (fresh / "new").write_text("new")
    assert names(folder.parent) == ["model"] and names(folder) == ["old"]


KILLED = """
import os, signal
from pathlib import Path
from tercet.files.atomic import replacing_folder

rename, done = Path.rename, []

def dying(path, target):
    if len(done) == {renames}:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    return rename(path, target)

Path.rename = dying
with replacing_folder(Path({folder!r})) as fresh:
    (fresh / "new").write_text("new")
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_at_either_rename_is_recovered(folder, renames):
    program = KILLED.format(renames=renames, folder=str(folder))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", program], env=environment)
    assert ended.returncode == -signal.SIGKILL
    assert folder.exists() == (renames == 0)
    recover_folder(folder)
    assert names(folder) == ["old"]
    assert [name[:10] for name in names(folder.parent)] == [".model.new", "model"]
    with replacing_folder(folder) as fresh:
        (fresh / "new").write_text("new")
    assert names(folder.parent) == ["model"] and names(folder) == ["new"]


def test_what_dead_processes_left_is_swept_and_what_is_in_use_is_not(folder):
    host, dead, alive = socket.gethostname(), dead_process(), os.getppid()
    kept = [f".model.new-{host}-{alive}-0", f".model.new-elsewhere-{dead}-0", ".model.new-notes"]
    for name in [f".model.new-{host}-{dead}-{n}" for n in range(2)] + kept:
        (folder.parent / name).mkdir()
        (folder.parent / name / "part").write_text("half")
    old = folder.parent / f".model.old-{host}-{dead}-0"
    old.mkdir()
    with replacing_folder(folder) as fresh:
        (fresh / "new").write_text("new")
    assert names(folder.parent) == sorted([*kept, "model"])


def test_files_that_dead_processes_left_are_swept_too(tmp_path):
    left = tmp_path / f".a.txt.new-{socket.gethostname()}-{dead_process()}-0"
    left.write_text("half")
    with replacing_file(tmp_path / "a.txt") as fresh:
        fresh.write_text("whole")
    assert names(tmp_path) == ["a.txt"]


def test_two_writers_at_once_leave_one_whole_folder(tmp_path):
    def write(number: int) -> None:
        with replacing_folder(tmp_path / "index") as fresh:
            for part in "ab":
                (fresh / part).write_text(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(40)))
    assert names(tmp_path) == ["index"] and names(tmp_path / "index") == ["a", "b"]
    assert len({path.read_text() for path in (tmp_path / "index").iterdir()}) == 1


def test_a_folder_put_in_place_between_the_two_renames_is_replaced(folder, monkeypatch):
    rename, others = Path.rename, []

    def racing(path, target):
        if ".new-" in path.name and not others:
            others.append(1)
            folder.mkdir()
            (folder / "other").write_text("of another process")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", racing)
    with replacing_folder(folder) as fresh:
        (fresh / "new").write_text("new")
    assert names(folder) == ["new"] and names(folder.parent) == ["model"]


def test_files_have_the_mode_of_the_umask(tmp_path, umask):
    with replacing_folder(tmp_path / "model") as fresh:
        (fresh / "deep").mkdir()
        for name in ("private", "deep/private"):
            (fresh / name).write_text("weights")
            (fresh / name).chmod(0o600)
    for name in ("private", "deep/private"):
        assert stat.S_IMODE((tmp_path / "model" / name).stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == 0o750


def test_a_saved_model_can_be_read_by_others(encoder_folder, tmp_path, umask):
    from tercet.models.embedder import Embedder

    Embedder.load(encoder_folder).save(tmp_path / "model")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").glob("*.*")}
    assert modes == {0o640}


@pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])
def test_a_file_in_place_of_a_parent_is_a_storage_error(tmp_path, replacing):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file: could not be written: a file is where"):
        with replacing(tmp_path / "file/inside"):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_does_not_take_the_place_of_a_folder_nor_a_folder_that_of_a_file(folder):
    with pytest.raises(StorageError, match="it is not a file"), replacing_file(folder):
        pass
    with pytest.raises(StorageError, match="it is a file"), replacing_folder(folder / "old"):
        pass
    assert names(folder) == ["old"] and (folder / "old").read_text() == "old"


def test_a_device_is_not_replaced():
    with pytest.raises(StorageError, match="it is not a file"), replacing_file(Path("/dev/null")):
        pass
    assert Path("/dev/null").is_char_device()


def test_a_place_closed_to_us_shows_before_the_work_is_done():
    for replacing in (replacing_file, replacing_folder):
        with pytest.raises(StorageError), replacing(Path("/proc/tercet")):
            pytest.fail("the work has begun")


def test_a_link_stays_and_what_it_points_to_is_replaced(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    with replacing_folder(tmp_path / "link") as fresh:
        (fresh / "new").write_text("new")
    assert (tmp_path / "link").is_symlink() and names(folder) == ["new"]
    (tmp_path / "latest").symlink_to(folder / "new")
    with replacing_file(tmp_path / "latest") as fresh:
        fresh.write_text("newer")
    assert (tmp_path / "latest").is_symlink() and (folder / "new").read_text() == "newer"


WRITERS = {
    "torch": lambda path: torch.save(torch.zeros(10_000), path),
    "safetensors": lambda path: save_file({"weight": torch.zeros(10_000)}, path),
    "numpy": lambda path: path.write_bytes(np.zeros(10_000).tobytes()),
    "parquet": lambda path: write_table(pa.table({"a": np.random.random(10_000)}), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_libraries_raise_when_the_disk_refuses_is_a_storage_error(tmp_path, name):
    (tmp_path / "a").write_text("old")
    with pytest.raises(StorageError, match=r"a: could not be written: .*nothing was changed there"):
        with small_disk(20_000), replacing_file(tmp_path / "a") as fresh:
            WRITERS[name](fresh)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_another_runtime_error_passes_as_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), replacing_file(tmp_path / "a.pt"):
        raise RuntimeError("shape")


def test_the_second_of_two_writers_is_refused_and_the_first_is_named(tmp_path):
    with sole_writer(tmp_path / "run"):
        for _ in range(2):  # the first one refused does not wipe out who it is
            with pytest.raises(RecipeError, match=f"run: process {os.getpid()} on .* is writing"):
                with sole_writer(tmp_path / "run"):
                    pass
    with sole_writer(tmp_path / "run"):
        pass


HOLDING = """
import sys, time
from pathlib import Path
from tercet.files.atomic import sole_writer

with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_process_keeps_nobody_out(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLDING, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(RecipeError, match=f"process {other.pid} on"), sole_writer(tmp_path):
            pass
        other.kill()
    with sole_writer(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_to_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file: could not be written"):
        with sole_writer(tmp_path / "file"):
            pass


def test_a_name_that_other_threads_do_not_use_is_given_to_each(tmp_path):
    assert files._beside(tmp_path / "a", "new") != files._beside(tmp_path / "a", "new")


def test_a_private_file_is_never_readable_by_others(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.touch(0o644)
    with replacing_file(path, private=True) as fresh:
        assert fresh.stat().st_mode & 0o777 == 0o600
        fresh.write_text("words")
        assert fresh.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_mode & 0o777 == 0o600
