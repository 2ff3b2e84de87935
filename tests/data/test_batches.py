"""Batches: every window once an epoch, the same for everyone."""

from __future__ import annotations

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
