"""Comparisons: what counts as one, what makes it void, and the words for it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import calibration
import intervals_cover
from damage import change
from made_arms import RATES, made
from samples import tiny
from storylab.cli import main
from storylab.data.dataset import Dataset
from storylab.errors import UserError
from storylab.experiments import experiment, measures
from storylab.experiments.compare import (
    Contest,
    compare_arms,
    compare_contests,
    compare_runs,
    group_runs,
)
from storylab.experiments.comparison import (
    BETTER,
    BETTER_WITHIN,
    CONFOUNDED,
    DIVERGED,
    EQUIVALENT,
    EXIT_CODES,
    UNDECIDED,
    WORSE,
    WORSE_WITHIN,
    Arm,
    Comparison,
    Noise,
    Ratio,
)
from storylab.experiments.family import Judgement, Rules
from storylab.experiments.noise import noise_floor, noise_of, paired_spreads, seen_by_pairs
from storylab.experiments.statistics import Interval, detectable_difference
from storylab.experiments.verdicts import detail_lines, ratio_text, verdict_line
from storylab.record.index import RunCache
from storylab.record.run import Run, load_run
from storylab.training.train import train


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two learning rates with two seeds: low-s1, low-s2, high-s1, high-s2."""
    root = tmp_path_factory.mktemp("compared")
    for name, rate in (("low", 1e-3), ("high", 1e-2)):
        for seed in (1, 2):
            out = root / f"{name}-s{seed}"
            train(tiny(dataset, out, learning_rate=rate, eval_interval=2, seed=seed))
    return root


@pytest.fixture
def low(trained: Path) -> Run:
    return load_run(trained / "low-s1")


def compared(low: Run, arm: list[float], baseline: list[float], **options: Any) -> Comparison:
    return compare_arms(
        made(low, arm, "arm", learning_rate=0.5), made(low, baseline, "base"), RATES, **options
    )


def test_a_difference_of_the_recipes_is_paired_by_seed(low: Run) -> None:
    base = [3.50, 3.40, 3.60]
    c = compared(low, [x - 0.1 + e for x, e in zip(base, (0.001, 0, -0.001), strict=True)], base)
    assert c.verdict == BETTER and c.pairs == 3 and c.paired
    assert c.recipes is not None and c.recipes.estimate == pytest.approx(-0.1)
    # The seeds' own spread, a hundred times that of the differences, is out of it.
    assert c.recipes.high < -0.09
    assert c.stories is not None and c.stories.n == len(low.story_losses)
    line = verdict_line(c)
    assert re.fullmatch(
        r"arm vs base: better by 0\.100 nats \(0\.098 to 0\.102\); .*\. 3 seeds: preliminary", line
    )


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ([0.05, 0.051, 0.049], None, WORSE),
        ([0.001, -0.001, 0.0005], 0.02, EQUIVALENT),
        ([0.03, -0.03, 0.01], 0.02, UNDECIDED),
        ([0.03, -0.03, 0.01], None, UNDECIDED),
        ([0.39, 0.097, 0.142], None, UNDECIDED),
        ([0.001, 0.0011, 0.0009], 0.02, WORSE_WITHIN),
        ([-0.0100, -0.0102, -0.0098], 0.02, BETTER_WITHIN),
    ],
)
def test_the_verdicts(
    low: Run, differences: list[float], margin: float | None, verdict: str
) -> None:
    base = [3.5, 3.4, 3.6]
    c = compared(low, [b + d for b, d in zip(base, differences, strict=True)], base, margin=margin)
    assert c.verdict == verdict
    line = verdict_line(c)
    if verdict == UNDECIDED:
        assert re.search(r"undecided: 0\.\d+ \w+ so far, from 0\.\d+ better to 0\.\d+ worse", line)
    if verdict == EQUIVALENT:
        assert re.search(
            r"equivalent: .* better to .* worse, within the margin of 0\.02 nats", line
        )
    if verdict in (WORSE_WITHIN, BETTER_WITHIN):
        assert "which is less than the margin of 0.02 nats" in line


MIRROR = {BETTER: WORSE, WORSE: BETTER, BETTER_WITHIN: WORSE_WITHIN, WORSE_WITHIN: BETTER_WITHIN}


@pytest.mark.parametrize("margin", [None, 0.02])
@pytest.mark.parametrize("lost", [(), (0,), (0, 1, 2)])
def test_a_verdict_mirrors_when_arm_and_baseline_are_exchanged(
    low: Run, margin: float | None, lost: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(3)
    for scale in (0.0003, 0.003, 0.03):
        for shift in (0.0, 0.01, 0.1):
            base = rng.normal(3.5, 0.1, 3)
            arm = made(low, list(base + rng.normal(shift, scale, 3)), "arm", learning_rate=0.5)
            runs = tuple(
                dataclasses.replace(run, state="diverged") if i in lost else run
                for i, run in enumerate(arm.runs)
            )
            arm, other = Arm("arm", runs), made(low, list(base), "base")
            c = compare_arms(arm, other, RATES, margin=margin)
            back = compare_arms(other, arm, RATES, margin=margin)
            assert back.verdict == MIRROR.get(c.verdict, c.verdict)
            assert back.settled == c.settled
            if c.ends and back.ends:
                assert back.ends == pytest.approx((-c.ends[1], -c.ends[0]))


@pytest.mark.slow
def test_no_line_names_a_winner_whose_interval_holds_zero(low: Run) -> None:
    """By Holm's method an arm may be settled whose interval for all arms together still holds zero."""
    rng = np.random.default_rng(4)
    signs_only = 0
    for _ in range(60):
        base = rng.normal(3.5, 0.1, 3)
        shifts = [0.1, 0.1, 0.1, 0.1, 0.006, 0.005]
        contests = [
            Contest(
                made(low, list(base + s + rng.normal(0, 0.002, 3)), f"arm {i}", learning_rate=0.5),
                made(low, list(base), "base"),
                RATES,
            )
            for i, s in enumerate(shifts)
        ]
        for c in compare_contests(contests, Rules()):
            line = verdict_line(c)
            if c.verdict in (BETTER, WORSE):
                signs_only += c.ends is None
                assert (c.ends is None) == ("by how much is not settled: up to" in line)
                assert c.ends is None or not c.ends[0] <= 0 <= c.ends[1]
            else:
                assert "better by" not in line and "worse by" not in line
    assert signs_only > 5


def test_one_seed_cannot_tell_without_a_noise_floor(low: Run, tmp_path: Path) -> None:
    low = dataclasses.replace(low, folder=tmp_path / "alone-s1")
    c = compared(low, [3.4], [3.5])
    assert c.verdict == UNDECIDED and c.stories is not None
    assert "no noise floor is known" in verdict_line(c)
    floor = Noise(3.5, 0.002, 5)
    assert compared(low, [3.4], [3.5], noise=floor).verdict == BETTER
    assert compared(low, [3.499], [3.5], noise=floor).verdict == UNDECIDED
    line = verdict_line(compared(low, [3.4], [3.5], noise=floor))
    assert "One run, and the noise of 5 seeds: preliminary" in line


def test_one_run_is_compared_with_the_mean_of_all_seeds_of_the_baseline(
    low: Run, tmp_path: Path
) -> None:
    low = dataclasses.replace(low, folder=tmp_path / "alone-s1")
    c = compared(low, [3.40], [3.50, 3.52, 3.48])
    assert c.recipes is not None and c.recipes.estimate == pytest.approx(-0.1)
    assert c.recipes.standard_error == pytest.approx(0.02 * (1 + 1 / 3) ** 0.5)
    back = compared(low, [3.50, 3.52, 3.48], [3.40])
    assert back.recipes is not None and back.recipes.estimate == pytest.approx(0.1)
    assert back.recipes.standard_error == pytest.approx(c.recipes.standard_error)


def test_one_pair_uses_the_noise_of_both_recipes_and_mirrors(trained: Path) -> None:
    low, high = load_run(trained / "low-s1"), load_run(trained / "high-s1")
    (c,), (back,) = compare_runs([low, high]), compare_runs([high, low])
    deviations = [
        float(np.std([load_run(trained / f"{name}-s{seed}").loss for seed in (1, 2)], ddof=1))
        for name in ("low", "high")
    ]
    assert c.recipes is not None and back.recipes is not None
    assert c.recipes.standard_error == pytest.approx(math.hypot(*deviations))
    assert c.recipes.estimate == pytest.approx(high.loss - low.loss)
    assert back.recipes.ends() == pytest.approx(tuple(-end for end in reversed(c.recipes.ends())))


def test_overlapping_seeds_are_all_used_where_that_is_the_better_design(low: Run) -> None:
    """Four against four seeds with two in common: the two alone have one degree of freedom."""
    arm = made(low, [3.40, 3.41, 3.42, 3.39], learning_rate=0.5)
    shifted = tuple(
        dataclasses.replace(
            run, config=dataclasses.replace(run.config, seed=3 + i, data_seed=3 + i)
        )
        for i, run in enumerate(arm.runs)
    )
    c = compare_arms(Arm("arm", shifted), made(low, [3.5, 3.51, 3.52, 3.49], "base"), RATES)
    assert c.verdict == BETTER and not c.paired
    assert any("2 seeds are shared by arms of 4 and 4" in note for note in c.notes)


def test_arms_without_a_common_seed_are_compared_unpaired(low: Run) -> None:
    arm = made(low, [3.40, 3.41, 3.42], learning_rate=0.5)
    shifted = tuple(
        dataclasses.replace(
            run, config=dataclasses.replace(run.config, seed=9 + i, data_seed=9 + i)
        )
        for i, run in enumerate(arm.runs)
    )
    c = compare_arms(Arm("arm", shifted), made(low, [3.5, 3.51, 3.52], "base"), RATES)
    assert not c.paired and c.verdict == BETTER
    assert "3 unpaired seeds: preliminary" in verdict_line(c)


def test_what_diverged_is_no_better_for_its_lucky_seeds(low: Run) -> None:
    base = made(low, [3.5, 3.4, 3.6], "base")
    arm = made(low, [3.1, 3.0, 3.2], "arm", learning_rate=0.5)
    lost = dataclasses.replace(arm.runs[2], state="diverged", reason="loss is nan")
    c = compare_arms(Arm("arm", (*arm.runs[:2], lost)), base, RATES)
    assert c.verdict == DIVERGED
    assert "arm vs base: diverged in 1 of 3 seeds (base in 0 of 3): no loss is compared" in (
        verdict_line(c)
    )
    details = "\n".join(detail_lines(c))
    assert "not finished: arm, seed 3: diverged (loss is nan)" in details
    assert "are not shown to differ in that (Fisher's exact test, p 1)" in details
    back = compare_arms(base, Arm("arm", (*arm.runs[:2], lost)), RATES)
    assert back.verdict == DIVERGED and "in 0 of 3 seeds (arm in 1 of 3)" in verdict_line(back)


def test_the_error_over_seeds_and_stories_is_satterthwaites() -> None:
    """0.03 of 20 degrees of freedom and 0.04 of 100 are 0.05 of 0.0025^2 / (0.0009^2/20 + 0.0016^2/100)."""
    stories = Interval(0.2, 0.04, 100, 101)
    both = intervals_cover.comparison(Judgement(Interval(0.1, 0.03, 20, 21)), stories).over_both
    assert both is not None
    assert (both.estimate, both.standard_error) == pytest.approx((0.1, 0.05))
    assert (both.df, both.n) == (pytest.approx(94.554, rel=1e-4), 21)
    equal = Interval(0.1, 0.0, 20, 21)  # to the bit
    both = intervals_cover.comparison(
        Judgement(equal), dataclasses.replace(equal, df=100)
    ).over_both
    assert both == equal


@pytest.mark.parametrize(
    ("diverged", "ended", "settled"),
    [
        ((3, 0), (3, 3), True),
        ((0, 2), (3, 2), True),
        ((2, 0), (3, 3), False),
        ((1, 0), (1, 3), False),
    ],
)
def test_divergence_is_settled_if_every_seed_of_a_side_did(
    diverged: tuple[int, int], ended: tuple[int, int], settled: bool
) -> None:
    made_up = intervals_cover.comparison(Judgement(), Interval(0.1, 0.01, 9, 10))
    c = dataclasses.replace(made_up, diverged=diverged, ended=ended)
    assert c.verdict == DIVERGED and c.settled is settled and not c.preliminary


@pytest.mark.parametrize(("seeds", "preliminary"), [(3, True), (4, True), (5, False), (8, False)])
def test_fewer_than_five_seeds_are_preliminary(seeds: int, preliminary: bool) -> None:
    stories = Interval(0.1, 0.01, 9, 10)
    judgement = Judgement(Interval(0.1, 0.01, seeds - 1, seeds))
    assert intervals_cover.comparison(judgement, stories).preliminary is preliminary


def test_the_guide_has_the_exit_code_of_every_verdict() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guide" / "command-line.md"
    rows = re.findall(r"^\| (`.*`) \| (\d+) \|$", guide.read_text(encoding="utf-8"), re.MULTILINE)
    told = {word: int(code) for words, code in rows for word in re.findall("`([^`]*)`", words)}
    assert {word: told[word] for word in EXIT_CODES} == EXIT_CODES


def test_runs_that_ended_finished_or_diverged(low: Run) -> None:
    runs = made(low, [3.5, 3.4, 3.6, 3.7], "base").runs
    states = ("diverged", "finished", "diverged", "unfinished")
    arm = Arm(
        "arm", tuple(dataclasses.replace(r, state=s) for r, s in zip(runs, states, strict=True))
    )
    assert (arm.diverged, arm.ended, len(arm.finished)) == (2, 3, 1)


def test_a_seed_counts_once(runs: Path, low: Run) -> None:
    """A copy of a run, or one set aside, is no second measurement."""
    shutil.copytree(runs / "low-s1", runs / "low-s1.old1")
    for other in ("low-s2", "high-s2"):
        shutil.rmtree(runs / other)
    assert noise_floor(load_run(runs / "low-s1")) is None
    folders = [runs / "low-s1", runs / "low-s1.old1", runs / "high-s1"]
    (c,) = compare_runs([load_run(folder) for folder in folders])
    assert c.verdict == UNDECIDED


def test_the_noise_of_other_code_or_data_is_not_this_noise(runs: Path) -> None:
    change(runs / "low-s2" / "environment.json", code_sha256="0")
    assert noise_floor(load_run(runs / "low-s1")) is None


def test_a_ratio_is_the_same_only_if_its_interval_says_so() -> None:
    words = ("faster", "slower", "speed")
    assert ratio_text(Ratio(1.0, 0.99, 1.01, 3), *words) == "same speed (0.99x to 1.01x)"
    assert (
        ratio_text(Ratio(2.7, 0.64, 11.85, 3), *words) == "2.70x faster (0.64 to 11.85: can't tell)"
    )
    assert ratio_text(Ratio(0.5, 0.4, 0.625, 3), *words) == "2.00x slower (1.60 to 2.50)"
    assert ratio_text(Ratio(1.31, None, None, 2), *words) == "1.31x faster (2 pairs)"
    assert ratio_text(Ratio(1.001, None, None, 1), *words) == "same speed (one pair)"


def test_memory_is_that_of_training_and_speed_that_of_the_median(runs: Path) -> None:
    path = runs / "low-s1/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "iteration":
            # The first evaluation is before iteration 2; iteration 5 met other work.
            row["peak_memory_bytes"] = 100 if row["iteration"] < 2 else 900
            row["step_seconds"] = 50.0 if row["iteration"] == 5 else 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = load_run(runs / "low-s1")
    assert result.training_memory == 100
    assert result.speed == 4 * 2 * 16 / 0.5


def test_hardware_of_a_resume_counts(runs: Path) -> None:
    stage = json.loads((runs / "high-s1/environment.json").read_text())
    other = stage | {"threads": 64, "packages": stage["packages"] | {"torch": "2.0"}}
    change(runs / "high-s1" / "environment.json", resumed=[other])
    c = compare_arms(
        Arm("high", (load_run(runs / "high-s1"),)),
        Arm("low", (load_run(runs / "low-s1"),)),
        RATES,
    )
    assert any(re.match(r"torch: 2\.0 and 2\.", text) for text in c.confounds)
    assert any(text.startswith("threads: ") for text in c.speed_confounds)


def test_runs_of_different_seeds_are_not_called_a_pair(runs: Path) -> None:
    for other in ("low-s2", "high-s1"):
        shutil.rmtree(runs / other)
    (c,) = compare_runs([load_run(runs / "low-s1"), load_run(runs / "high-s2")])
    line = verdict_line(c)
    assert c.verdict == UNDECIDED and "runs of different seeds, other weights" in line
    assert "one pair" not in line and "equal time" not in line


def test_many_arms_are_corrected_for_their_number(low: Run) -> None:
    base = [3.5, 3.4, 3.6]
    differences = [0.0101, 0.0049, 0.0070]  # p about 0.04 on its own
    one = compared(low, [b + d for b, d in zip(base, differences, strict=True)], base)
    assert one.verdict == WORSE
    contest = Contest(
        made(low, [b + d for b, d in zip(base, differences, strict=True)], learning_rate=0.5),
        made(low, base, "base"),
        RATES,
    )
    null = Contest(made(low, [3.51, 3.39, 3.6], learning_rate=0.5), contest.baseline, RATES)
    many = compare_contests([contest, *[null] * 4], Rules(variance="own"))
    assert many[0].verdict == UNDECIDED and many[0].judgement.family == 5
    assert "holds for all 5 arms together" in verdict_line(many[0])


def test_an_equal_loss_is_reached_with_fewer_tokens_by_the_better_arm(low: Run) -> None:
    """The arm's curve is the baseline's shifted to half the tokens, so its ratio is two."""

    def curved(arm: Arm, factor: float) -> Arm:
        runs = []
        for run in arm.runs:
            points = [
                dataclasses.replace(point, val_loss=5 - np.log(point.tokens * factor) / 3)
                for point in run.evaluations
            ]
            runs.append(dataclasses.replace(run))
            runs[-1].__dict__["evaluations"] = points  # cached: as if read from the rows
        return Arm(arm.name, tuple(runs))

    base = curved(made(low, [3.5, 3.4, 3.6], "base"), 1.0)
    arm = curved(made(low, [3.4, 3.3, 3.5], learning_rate=0.5), 2.0)
    c, back = compare_arms(arm, base, RATES), compare_arms(base, arm, RATES)
    assert c.reach is not None and back.reach is not None
    assert c.reach.tokens.value == pytest.approx(2.0) == c.reach.flops.value
    assert back.reach.tokens.value == pytest.approx(0.5)
    assert "2.00x fewer tokens" in "\n".join(detail_lines(c))


# Confounds


def void(runs: Path, changes: Callable[[Path], None]) -> tuple[str, ...]:
    """Confounds of high against low after ``changes`` to the folder of high-s1."""
    changes(runs / "high-s1")
    a, b = load_run(runs / "high-s1"), load_run(runs / "low-s1")
    c = compare_arms(Arm("high", (a,)), Arm("low", (b,)), RATES)
    assert (c.verdict == CONFOUNDED) == bool(c.confounds)
    if c.confounds:
        assert "confounded, no winner is given" in verdict_line(c) and c.stories is None
        assert "better" not in verdict_line(c) and "worse" not in verdict_line(c)
    return c.confounds


def test_runs_that_differ_in_the_factor_alone_are_not_confounded(runs: Path) -> None:
    assert void(runs, lambda folder: None) == ()


def test_a_change_beside_the_factor_is_named(runs: Path) -> None:
    (text,) = void(runs, lambda folder: change(folder / "config.json", beta1=0.5))
    assert text == "beta1: 0.5 against 0.9"


def test_another_batch_is_named(runs: Path) -> None:
    texts = void(runs, lambda folder: change(folder / "config.json", batch_size=8))
    assert "batch_size: 8 against 4" in texts


def test_other_data_are_named(runs: Path) -> None:
    (text,) = void(runs, lambda folder: change(folder / "data.json", fingerprint="0" * 64))
    assert "data: fingerprint 000000000000 against" in text


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("initial_weights_sha256", "initial weights"),
        ("first_batch_sha256", "data order"),
        ("code_sha256", "code: 2 versions"),
    ],
)
def test_hashes_that_should_be_shared_are_compared(runs: Path, key: str, message: str) -> None:
    (text,) = void(runs, lambda folder: change(folder / "environment.json", **{key: "0" * 64}))
    assert message in text


def test_other_hardware_is_a_confound_by_name(runs: Path) -> None:
    """Of the loss where bits differ, as on a GPU and in another dtype; else of the speed alone."""
    pair = [Arm(name, (load_run(runs / f"{name}-s1"),)) for name in ("high", "low")]
    assert compare_arms(*pair, RATES).confounds == ()
    folder = runs / "high-s1"
    change(folder / "environment.json", processor="Another CPU")
    c = compare_arms(Arm("high", (load_run(folder),)), pair[1], RATES)
    assert c.confounds == ()
    assert any(text.startswith("processor: Another CPU against") for text in c.speed_confounds)
    change(folder / "environment.json", device="cuda", gpu="NVIDIA H100")
    change(folder / "config.json", device="cuda", dtype="bfloat16")
    c = compare_arms(Arm("high", (load_run(folder),)), pair[1], RATES)
    assert {"device: cuda against cpu", "dtype: bfloat16 against float32"} <= set(c.confounds)
    assert "gpu: NVIDIA H100 against None" in c.speed_confounds


@pytest.mark.parametrize(
    ("field", "value", "explained"),
    [
        ("embedding_residual", True, True),
        ("value_residual", "first_layer", True),
        ("qk_norm", True, False),
    ],
)
def test_other_initial_weights_are_explained_by_fields_that_make_them(
    runs: Path, field: str, value: Any, explained: bool
) -> None:
    path = runs / "high-s1" / "config.json"
    config = json.loads(path.read_text())
    change(runs / "high-s1" / "config.json", model=config["model"] | {field: value})
    change(runs / "high-s1" / "environment.json", initial_weights_sha256="0" * 64)
    arms = (Arm(n, (load_run(runs / f"{n}-s1"),)) for n in ("high", "low"))
    c = compare_arms(*arms, allowed=RATES | {field})
    assert (c.confounds == ()) == explained


def test_a_resume_by_other_code_is_another_version(runs: Path) -> None:
    stage = json.loads((runs / "high-s1/environment.json").read_text())
    resumed = [stage | {"code_sha256": "1" * 64}]
    (text,) = void(runs, lambda folder: change(folder / "environment.json", resumed=resumed))
    assert "code: 2 versions" in text


def test_another_torch_is_named(runs: Path) -> None:
    packages = json.loads((runs / "low-s1/environment.json").read_text())["packages"]
    texts = void(
        runs,
        lambda folder: change(folder / "environment.json", packages=packages | {"torch": "1.0"}),
    )
    assert texts[0].startswith("torch: 1.0 against")


def test_other_stories_are_another_evaluation(runs: Path) -> None:
    def shift_tokens(folder: Path) -> None:
        table = np.load(folder / "story_losses.npy")
        table[0, 1] += 1
        table[1, 1] -= 1
        np.save(folder / "story_losses.npy", table)

    assert void(runs, shift_tokens) == ("evaluation: other stories or tokens",)


def test_other_hardware_voids_speed_but_not_the_loss(runs: Path) -> None:
    change(runs / "high-s1" / "environment.json", processor="Abacus", threads=96)
    a, b = load_run(runs / "high-s1"), load_run(runs / "low-s1")
    c = compare_arms(Arm("high", (a,)), Arm("low", (b,)), RATES)
    assert not c.confounds and c.equal_time is None
    assert "speed is not comparable (processor: Abacus against" in verdict_line(c)


def test_two_factors_at_once_are_confounded(runs: Path) -> None:
    change(runs / "high-s1" / "config.json", weight_decay=0.5)
    (c,) = compare_runs([load_run(runs / "low-s1"), load_run(runs / "high-s1")])
    assert c.verdict == CONFOUNDED and len(c.confounds) == 2


# Runs on disk


def test_runs_of_a_recipe_are_one_arm(trained: Path) -> None:
    names = ("low-s1", "high-s1", "high-s2", "low-s2")
    arms = group_runs([load_run(trained / name) for name in names])
    assert [(arm.name, len(arm.runs)) for arm in arms] == [
        ("low-s1", 2),
        ("high-s1 (learning_rate 0.01)", 2),
    ]


def test_the_noise_floor_is_that_of_the_seeds_beside_a_run(trained: Path) -> None:
    floor = noise_floor(load_run(trained / "low-s1"))
    losses = [load_run(trained / f"low-s{seed}").loss for seed in (1, 2)]
    assert floor is not None and floor.seeds == 2
    assert floor.standard_deviation == pytest.approx(np.std(losses, ddof=1))


def test_equal_time_is_read_off_both_curves(trained: Path) -> None:
    (c,) = compare_runs([load_run(trained / f"{n}-s1") for n in ("low", "high")])
    assert c.equal_time is not None and 0 < c.equal_time.progress <= 1


def test_a_run_is_no_confound_for_itself(low: Run) -> None:
    c = compare_arms(made(low, [3.5, 3.4]), made(low, [3.5, 3.4], "base"), frozenset())
    assert c.verdict == UNDECIDED and c.recipes is not None and c.recipes.p == 1.0


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("story_losses.npy", b"junk"),
        ("summary.json", b"{"),
        ("config.json", b"[]"),
        ("environment.json", b"{}"),
        ("metrics.jsonl", b""),
        ("summary.json", b'{"status": "finished"}'),
    ],
)
def test_a_damaged_run_is_told_of(runs: Path, file: str, damage: bytes) -> None:
    (runs / "low-s1" / file).write_bytes(damage)
    with pytest.raises(UserError, match="low-s1"):
        load_run(runs / "low-s1")


def test_losses_that_are_not_those_of_the_summary_are_damage(runs: Path) -> None:
    table = np.load(runs / "low-s1/story_losses.npy")
    table[3, 0] *= 1.01
    np.save(runs / "low-s1/story_losses.npy", table)
    with pytest.raises(UserError, match="not that of its summary"):
        load_run(runs / "low-s1")


# The command line


def test_compare_prints_the_verdict_and_what_stands_behind_it(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(trained / name) for name in ("low-s1", "low-s2", "high-s1", "high-s2")]
    assert main(["compare", *folders, "--margin", "0.01"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("high-s1 (learning_rate 0.01) vs low-s1: ")
    assert "these models on stories like these" in out and "2 seeds: preliminary" in out
    assert "energy: not measured" in out


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["low-s1"], "two runs or more"),
        (["low-s1", "low-s1"], "given twice"),
        (["low-s1", "low-s2"], "differ in their seeds alone"),
        (["low-s1", "nowhere"], "is not a run folder"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    trained: Path, capsys: pytest.CaptureFixture[str], names: list[str], message: str
) -> None:
    assert main(["compare", *(str(trained / name) for name in names)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_noise_is_printed_with_its_interval(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["noise", str(trained / "low-s1")]) == 0
    out = capsys.readouterr().out
    assert "standard deviation" in out and "2 seeds" in out and "5 pairs of seeds could see" in out
    # Two common seeds are too few for the spread of differences.
    assert "without pairing: an upper bound" in out


def test_what_pairs_could_see_comes_from_the_spread_of_their_differences(
    runs: Path, low: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders of five seeds of two recipes whose losses move together, against numpy's figures."""
    base = np.array([3.50, 3.40, 3.60, 3.55, 3.45])
    arm = base - 0.1 + np.array([0.001, -0.002, 0.0005, 0.001, 0.0])
    arms = [made(low, list(base), "base"), made(low, list(arm), "arm", learning_rate=0.5)]
    unlike = made(low, list(base), "unlike", learning_rate=0.5, block_size=8)
    folders = {}
    # A factor that changes nothing does not show the spread of one that does.
    same = made(low, list(base), "same", learning_rate=0.7)
    # A run that was set aside comes after the one that replaced it.
    aside = made(low, [9.9], "base.old")
    for name, made_arm in (
        ("base", arms[0]),
        ("arm", arms[1]),
        ("unlike", unlike),
        ("same", same),
        ("base.old", aside),
    ):
        for run in made_arm.runs:
            folder = runs / f"{name}-{run.config.seed}"
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            folders[folder] = dataclasses.replace(run, folder=folder)

    class Known(RunCache):
        """A cache that holds the runs above, and nothing else."""

        def head(self, folder: Path) -> Any:
            if folder not in folders:
                raise UserError("another run")
            return folders[folder]

        load = head

    ours = [run for folder, run in folders.items() if folder.name.startswith("base")]
    (spread,) = paired_spreads(ours, Known())
    assert spread.seeds == 5
    # Too large as often as too small: 3.357 is the median of chi-squared with 4 degrees of freedom.
    deviation = float(np.std(arm - base, ddof=1)) * math.sqrt(4 / 3.35669)
    assert spread.standard_deviation == pytest.approx(deviation)
    assert spread.correlation == pytest.approx(np.corrcoef(arm, base)[0, 1])
    floor = noise_of(ours)
    assert floor is not None and paired_spreads(ours[:2], Known()) == []
    first, *lines = seen_by_pairs(floor, [spread])
    assert "1 like recipe " in first and "5 common seeds" in first
    shown = [float(line.split()[-1]) for line in lines]
    wanted = [detectable_difference(deviation, n) for n in (3, 5, 10)]
    assert shown == pytest.approx(wanted, abs=1e-4)
    # The seeds' spread without pairing says many times as much.
    unpaired = [float(line.split(" (")[0].split()[-1]) for line in seen_by_pairs(floor, [])[1:]]
    assert unpaired[0] > 50 * shown[0]


@pytest.mark.slow
@pytest.mark.parametrize("baselines", [2, 3, 5])
def test_one_run_against_several_of_its_own_recipe_names_few_winners(
    low: Run, baselines: int
) -> None:
    """The calibration's path, on simulated losses: the run's own pair is part of the noise floor."""
    rng = np.random.default_rng(3)
    runs = list(made(low, list(3.5 + rng.normal(0, 0.01, 200))).runs)
    share = calibration.false_positives_of_one_run(runs, baselines, rng, draws=300)
    assert share < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.slow
@pytest.mark.parametrize("paired", [True, False])
def test_arms_of_equal_recipes_name_few_winners(low: Run, paired: bool) -> None:
    rng = np.random.default_rng(4)
    runs = list(made(low, list(3.5 + rng.normal(0, 0.01, 200))).runs)
    share = calibration.false_positives(runs, 3, paired, rng, draws=300)
    assert share < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_list_shows_sorts_and_filters(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "high-s2/summary.json").unlink()
    (runs / "low-s2/summary.json").write_text("{")
    assert main(["list", "--runs", str(runs), "--sort", "loss"]) == 0
    out = capsys.readouterr().out
    assert "4 runs" in out and "unfinished" in out and "damaged" in out
    assert out.index("high-s1") < out.index("low-s1")
    assert main(["list", "--runs", str(runs), "--status", "finished", "--contains", "low"]) == 0
    out = capsys.readouterr().out
    assert "1 runs" in out and "low-s1" in out and "high" not in out
    assert main(["list", "--runs", str(runs / "nowhere")]) == 2


def test_detail_lines_name_what_is_behind_a_verdict(low: Run) -> None:
    lines = detail_lines(compared(low, [3.4, 3.5, 3.6], [3.41, 3.49, 3.62], margin=0.02))
    text = "\n".join(lines)
    for part in (
        "recipes:",
        "own variance",
        "new seeds and new stories together:",
        "correlation of the arms over 3 seeds",
        "seed noise of base",
        "speed:",
        "memory of training:",
    ):
        assert part in text


def test_every_metric_of_an_expectation_can_be_computed() -> None:
    assert set(experiment.METRICS) == set(measures.MEASURES)
