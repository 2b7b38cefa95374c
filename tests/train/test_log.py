import pytest

from tercet.errors import StorageError
from tercet.train.log import Log, read
from tests.toy import small_disk


def test_a_log_goes_on_behind_the_checkpoint_and_forgets_what_came_after(tmp_path):
    log = Log(tmp_path, step=0)
    for step in (1, 2, 3):
        log.write(step, loss=step / 2)
    log.close()
    log = Log(tmp_path, step=2)
    log.write(3, loss=9.0)
    log.close()
    assert read(tmp_path / "log.jsonl") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]


def test_a_last_line_that_a_kill_cut_short_is_not_read(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read(tmp_path / "log.jsonl") == [{"step": 1, "loss": 0.5}]
    assert read(tmp_path / "absent.jsonl") == []


def test_a_full_disk_is_a_storage_error_when_writing_and_when_closing(tmp_path):
    log = Log(tmp_path, step=0)
    with small_disk(100):
        with pytest.raises(StorageError, match=r"log\.jsonl: could not be written"):
            for step in range(10):
                log.write(step, loss=0.5)
        with pytest.raises(StorageError, match=r"log\.jsonl: could not be written"):
            log.close()
    assert [record["step"] for record in read(tmp_path / "log.jsonl")] == [0, 1, 2, 3]
