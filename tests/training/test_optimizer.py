import pytest

from tercet.training.optimizer import factor


def test_wsd_rises_stays_and_falls():  # trap A14
    # 4 steps up, 4 on the plateau, the last 2 down
    factors = [factor("wsd", step, 10, warmup=4, decay=2) for step in range(10)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 0.5])


def test_a_fine_tuning_preset_is_constant_and_then_decays():  # trap A14, arXiv 2412.04506
    assert factor("wsd", 0, 9_342, decay=6_000) == 1
    assert factor("wsd", 3_342, 9_342, decay=6_000) == 1
    assert factor("wsd", 3_343, 9_342, decay=6_000) == pytest.approx(5_999 / 6_000)
    assert factor("wsd", 9_341, 9_342, decay=6_000) == pytest.approx(1 / 6_000)


def test_linear_falls_from_the_end_of_the_warmup():
    factors = [factor("linear", step, 6, warmup=2) for step in range(6)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25])


def test_constant_stays():
    assert [factor("constant", step, 3) for step in range(3)] == [1, 1, 1]


def test_no_step_has_a_rate_of_zero():
    for name in ("constant", "linear", "wsd"):
        for warmup in (0, 1, 5):
            assert all(factor(name, s, 9, warmup=warmup, decay=4) > 0 for s in range(9))


def test_an_early_decay_falls_first_and_stays_at_a_tenth():  # trap A14, read the other way
    factors = [factor("early", step, 8, warmup=1, decay=4) for step in range(8)]
    assert factors == pytest.approx([0.5, 1, 0.775, 0.55, 0.325, 0.1, 0.1, 0.1])
    assert factor("early", 6_000, 9_342, decay=6_000) == pytest.approx(0.1)
