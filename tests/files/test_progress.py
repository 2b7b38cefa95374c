import pytest

from tercet.files import progress
from tercet.files.progress import bar, notes, time_text


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_long_job_prints_a_plain_line_every_minute(clock, capsys):
    with bar("contrastive", 1000, 200, unit="step ") as advance:
        for seconds in (0, 10, 6, 50, 20, 60):  # 10, 16, 66, 86 and 146 in all
            clock[0] += seconds
            advance(100 if seconds else 0, "loss 0.1")
    assert capsys.readouterr().err.splitlines() == [
        "contrastive: step 400 of 1,000, loss 0.1, about 48 s left",
        "contrastive: step 600 of 1,000, loss 0.1, about 86 s left",
        "contrastive: step 700 of 1,000, loss 0.1, about 88 s left",
    ]


def test_a_job_of_unknown_length_is_counted_and_a_short_or_hidden_one_is_silent(clock, capsys):
    for shown, seconds in ((True, 14), (False, 1000)):
        with bar("rows", 10, shown=shown) as advance:
            clock[0] += seconds
            advance(10)
    assert capsys.readouterr().err == ""
    with bar("rows", None) as advance:
        clock[0] += 20
        advance(1234)
    assert capsys.readouterr().err == "rows: 1,234\n"


def test_times_are_readable():
    times = [time_text(seconds) for seconds in (0.2, 98.0, 100.0, 5900.0, 7500.0)]
    assert times == ["0 s", "98 s", "2 min", "98 min", "2 h 5 min"]


def test_a_job_inside_of_another_tells_its_count_beside_the_other_s_bar():
    reported: list[tuple[int, str]] = []
    bars = notes(lambda count=1, note="": reported.append((count, note)))
    with bars("documents", 2000) as advance:
        advance(1500)
        advance()
    with bars("read", None) as advance:
        advance(3, "unheard")
    assert reported == [
        (0, "documents 1,500 of 2,000"),
        (0, "documents 1,501 of 2,000"),
        (0, "read 3"),
    ]
