"""The first stop signal is noted, a second one is obeyed at once."""

from __future__ import annotations

import signal

import pytest

from finished_runs import metrics, weights
from samples import MakeConfig
from storylab.errors import StoppedAtOnce
from storylab.record.folder import open_run
from storylab.training import signals
from storylab.training.observers import Observer
from storylab.training.resume import resume
from storylab.training.signals import stop_signals
from storylab.training.train import train


@pytest.fixture
def no_relays(monkeypatch: pytest.MonkeyPatch) -> None:
    # A test need not wait until a signal counts as another one.
    monkeypatch.setattr(signals, "RELAY_SECONDS", 0.0)


def test_a_signal_that_is_passed_on_is_the_same_request() -> None:
    noted: list[int] = []
    with stop_signals(noted.append):
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
    assert noted == [signal.SIGTERM]


@pytest.mark.usefixtures("no_relays")
def test_a_later_sigterm_interrupts_with_its_exit_code() -> None:
    noted: list[int] = []
    with pytest.raises(StoppedAtOnce, match="at once") as stop, stop_signals(noted.append):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the second signal was not obeyed")
    assert stop.value.exit_code == 128 + signal.SIGTERM and noted == [signal.SIGINT]


def test_a_second_ctrl_c_is_never_taken_for_the_first() -> None:
    with pytest.raises(KeyboardInterrupt), stop_signals(lambda number: None):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)


def test_handlers_are_those_of_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in signals.STOPPING]
    with stop_signals(lambda number: None):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in signals.STOPPING] == before


@pytest.mark.slow
@pytest.mark.usefixtures("no_relays")
def test_a_run_that_two_signals_stop_resumes_from_its_checkpoint(
    tiny_config: MakeConfig,
) -> None:
    class Twice(Observer):
        def progress(self, name: str, done: int, total: int) -> None:
            if (name, done) == ("training", 3):
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)

    whole = train(tiny_config(out_dir=tiny_config().out_dir.with_name("whole")))
    config = tiny_config()
    with pytest.raises(StoppedAtOnce):
        train(config, Twice())
    again = resume(config.out_dir)
    assert again.read_environment().resumed[0].iteration == 0  # no checkpoint was saved
    assert weights(again) == weights(whole) and metrics(again) == metrics(whole)
    assert open_run(config.out_dir).read_summary() is not None
