"""Learning rates by hand, those of the original log among them."""

from __future__ import annotations

import dataclasses

import pytest

from storylab.config import TrainConfig
from storylab.optim import schedule
from storylab.optim.schedule import SCHEDULES, Schedule, learning_rate, telling_iterations


@pytest.mark.parametrize("iteration", [0, 100, 500, 999, 1000])
def test_learning_rates_of_the_original_log(iteration: int) -> None:
    assert learning_rate(TrainConfig(), iteration) == pytest.approx(iteration * 1e-7, rel=1e-12)


def test_cosine_of_a_longer_run_ends_at_half_the_peak() -> None:
    config = TrainConfig(max_iters=5000)
    assert learning_rate(config, 1000) == pytest.approx(1e-4)
    assert learning_rate(config, 3000) == pytest.approx(7.5e-5)
    assert learning_rate(config, 5000) == pytest.approx(5e-5)
    rates = [learning_rate(config, i) for i in range(1000, 5001)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)


def test_other_schedules() -> None:
    linear = TrainConfig(max_iters=100, warmup_iters=0, schedule="linear", min_lr=0.0)
    assert learning_rate(linear, 0) == 1e-4  # no warm-up starts at the peak
    assert learning_rate(linear, 25) == pytest.approx(0.75e-4)
    constant = TrainConfig(max_iters=100, warmup_iters=10, schedule="constant")
    assert learning_rate(constant, 5) == pytest.approx(0.5e-4)
    assert {learning_rate(constant, i) for i in (10, 50, 100)} == {1e-4}


def test_a_schedule_may_bend_by_a_field_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant, then down in a line (Hu et al. 2024, arXiv 2404.06395): two courses that differ only behind
    few iterations distinguish their bends."""

    def left(progress: float, config: TrainConfig) -> float:
        stable = 1 - config.ema_fraction  # in place of the field
        return 1.0 if progress <= stable else (1 - progress) / (1 - stable)

    bending = Schedule(left, bends=lambda config: (1 - config.ema_fraction,))
    monkeypatch.setitem(schedule.SCHEDULES, "constant", bending)
    a = TrainConfig(
        schedule="constant", warmup_iters=10, max_iters=100_010, ema_fraction=0.001, min_lr=0.0
    )
    b = dataclasses.replace(a, ema_fraction=0.0011)
    assert learning_rate(a, 99_910) == learning_rate(b, 50) == a.learning_rate
    assert learning_rate(a, 99_960) == pytest.approx(a.learning_rate / 2)
    chosen = telling_iterations((a, b), a.iterations)
    assert len(chosen) < 200
    assert any(learning_rate(a, i) != learning_rate(b, i) for i in chosen)


def test_a_constant_schedule_never_reads_its_end() -> None:
    assert [name for name, s in SCHEDULES.items() if not s.decays] == ["constant"]
    for peak, end in ((1e-4, 5e-5), (0.01, 0.001), (0.003, 0.0001)):
        config = TrainConfig(
            schedule="constant", warmup_iters=2, max_iters=9, learning_rate=peak, min_lr=end
        )
        assert {learning_rate(config, i) for i in range(2, 10)} == {peak}


@pytest.mark.parametrize(
    ("end", "bends", "expected"),
    [
        (110, (), [*range(18), 22, 35, 47, 60, 72, 85, 97, *range(103, 110)]),
        (50, (), [*range(18), 20, 25, 30, 35, 40, *range(43, 50)]),
        (0, (), []),
        (
            110,
            (0.25,),
            [*range(18), 19, 22, 25, *range(28, 43), 44, 53, 63, 72, 81, 91, 100, *range(103, 110)],
        ),
    ],
)
def test_telling_iterations_are_at_the_ends_of_every_stretch(
    monkeypatch: pytest.MonkeyPatch, end: int, bends: tuple[float, ...], expected: list[int]
) -> None:
    """Eight at each end and at the eighths, by hand, of 0 to 10, 10 to 110, and cut at a bend."""
    bending = Schedule(lambda progress, config: 1.0 - progress, bends=lambda config: bends)
    monkeypatch.setitem(schedule.SCHEDULES, "linear", bending)
    config = TrainConfig(schedule="linear", warmup_iters=10, max_iters=110)
    assert telling_iterations((config,), end) == expected


def test_the_rate_stays_at_its_end_beyond_the_run() -> None:
    config = TrainConfig(schedule="linear", warmup_iters=10, max_iters=20, min_lr=1e-5)
    assert learning_rate(config, 20) == learning_rate(config, 500) == pytest.approx(1e-5)
    assert learning_rate(config, 15) == pytest.approx(5.5e-5)
    short = TrainConfig(schedule="linear", warmup_iters=20, max_iters=20, min_lr=1e-5)
    assert learning_rate(short, 20) == short.learning_rate
    assert learning_rate(short, 21) == pytest.approx(1e-5)
