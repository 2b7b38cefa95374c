from tercet.files.progress import notes


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
