"""Batches: every window once an epoch, the same for everyone."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storylab.data.batches import Prefetcher, TrainingBatches, evaluation_windows, permutation
from storylab.data.dataset import (
    Split,
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.text(max_size=5))
def test_permutation_is_one(length: int, key: str) -> None:
    order = permutation(length, key)
    assert sorted(order.tolist()) == list(range(length))
    assert np.array_equal(order, permutation(length, key))


def test_permutation_has_no_visible_order() -> None:
    order = permutation(20_000, "a")
    assert abs(np.corrcoef(np.arange(20_000), order)[0, 1]) < 0.03
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(order, permutation(20_000, "b"))[0, 1]) < 0.03


def counting_split(length: int) -> Split:
    ids = np.arange(length, dtype=np.uint16)
    return Split("train", (ids,), (0, length), np.array([[0, 0], [length, length]]))


@settings(max_examples=40, deadline=None)
@given(st.integers(10, 400), st.integers(1, 9), st.integers(1, 30), st.integers(0, 3))
def test_every_window_once_per_epoch(length: int, block: int, sequences: int, seed: int) -> None:
    batches = TrainingBatches(counting_split(length), "f", seed, block, sequences)
    per_epoch = batches.windows_per_epoch
    assert per_epoch == (length - 1) // block
    targets = {w * block + i for w in range(per_epoch) for i in range(1, block + 1)}
    assert batches.unseen == length - 1 - len(targets)
    iterations = -(-2 * per_epoch // sequences)
    windows = np.concatenate([batches.windows(i) for i in range(iterations)])
    first, second = windows[:per_epoch], windows[per_epoch : 2 * per_epoch]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(per_epoch))


def test_a_batch_is_a_function_of_fingerprint_seed_and_iteration() -> None:
    def make(fingerprint: str = "f", seed: int = 1) -> TrainingBatches:
        return TrainingBatches(counting_split(2000), fingerprint, seed, 8, 12)

    batches = make()
    later_first = [batches(i) for i in (40, 3, 0)]
    assert torch.equal(later_first[1], make()(3))
    batch = later_first[1]
    assert batch.shape == (12, 9)
    assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)  # targets are the next tokens
    assert not torch.equal(batch, make(seed=2)(3))
    assert not torch.equal(batch, make(fingerprint="g")(3))


def test_prefetching_changes_nothing() -> None:
    batches = TrainingBatches(counting_split(2000), "f", 1, 8, 12)
    prefetcher = Prefetcher(batches)
    for i in (0, 1, 2, 7, 8, 3):
        assert torch.equal(prefetcher(i), batches(i))
    prefetcher.close()


def test_evaluation_windows_are_fixed_and_spread() -> None:
    split = counting_split(1001)
    starts = evaluation_windows(split, 10, 25)
    assert starts.tolist() == list(range(0, 1000, 40))
    assert evaluation_windows(split, 10, 500).tolist() == list(range(0, 1000, 10))


def test_windows_are_the_same_across_shards() -> None:
    """Against slices of the tokens as one array; shards shorter than a window too."""
    tokens = np.random.default_rng(0).integers(0, 60_000, 1000).astype(np.uint16)
    cuts = [0, 400, 403, 404, 900, 1000]
    shards = tuple(tokens[a:b] for a, b in itertools.pairwise(cuts))
    split = Split("train", shards, tuple(cuts), np.zeros((2, 2), dtype=np.int64))
    starts = np.random.default_rng(1).permutation(1000 - 33)[:300]
    found = split.windows(starts, 33)
    assert found.dtype == np.int64
    assert all(
        np.array_equal(row, tokens[s : s + 33]) for row, s in zip(found, starts, strict=True)
    )


def splitmix64(number: int, start: int) -> int:
    """Output ``number`` of the generator from the state ``start``, in whole numbers (Steele, Lea &
    Flood 2014, figure 17)."""
    mask = 2**64 - 1
    x = (start + number * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_the_generator_is_the_published_one() -> None:
    """The first outputs from the state 1234567, as other programs' tests have them."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(number, 1234567) for number in range(1, 5)] == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**32), st.integers(0, 5))
def test_the_order_is_by_the_hash_of_every_number(length: int, seed: int, epoch: int) -> None:
    """The order of every run so far: another one would be another batch at each iteration."""
    key = f"f:{seed}:{epoch}"
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    expected = sorted(range(length), key=lambda number: splitmix64(number + 1, start))
    assert permutation(length, key).tolist() == expected
    batches = TrainingBatches(counting_split(8 * length + 1), "f", seed, 8, length)
    assert batches.windows(epoch).tolist() == expected
    assert batches.epochs(7) == 7 and batches.windows_per_epoch == length


def test_a_prefetched_batch_is_made_once() -> None:
    made: list[int] = []

    def make(iteration: int) -> torch.Tensor:
        made.append(iteration)
        return torch.tensor(iteration)

    prefetcher = Prefetcher(make)
    for iteration in (4, 5, 6, 7):
        assert prefetcher(iteration) == iteration
    prefetcher.close()
    assert made[:4] == [4, 5, 6, 7] and len(set(made)) == len(made)


def test_evaluation_windows_need_a_target_after_the_last() -> None:
    assert evaluation_windows(counting_split(1000), 10, 500).tolist() == list(range(0, 990, 10))
    assert evaluation_windows(counting_split(1001), 10, 100).tolist() == list(range(0, 1000, 10))
    assert evaluation_windows(counting_split(1001), 10, 3).tolist() == [0, 330, 660]
