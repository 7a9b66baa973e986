"""The order of rows over processes: in step, nothing twice, like lengths together, entered again at any step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from bundle.errors import UsageError
from distill.batches.batch_order import LengthGroupedOrder

MANY = settings(max_examples=40, deadline=None)
SIZES = {"rows": st.integers(1, 400), "batch": st.integers(1, 7), "seed": st.integers(0, 5)}


def order(rows: int, batch: int, seed: int, processes: int, epoch: int = 0) -> LengthGroupedOrder:
    lengths = np.random.RandomState(rows).randint(1, 60, rows)
    made = LengthGroupedOrder(lengths, batch, seed, processes)
    made.set_epoch(epoch)
    return made


def shards(one: LengthGroupedOrder, batch: int, processes: int) -> list[BatchSamplerShard]:
    """As accelerate deals batches out."""
    return [BatchSamplerShard(BatchSampler(one, batch, False), processes, i) for i in range(processes)]


@MANY
@given(**SIZES, processes=st.integers(2, 9), epoch=st.integers(0, 3))
def test_every_process_makes_the_same_steps_and_no_row_comes_twice(
    rows: int, batch: int, seed: int, processes: int, epoch: int
) -> None:
    if rows < batch * processes:
        with pytest.raises(UsageError, match=f"{rows} rows are fewer than one step of {processes} processes"):
            order(rows, batch, seed, processes)
        return
    dealt = [list(shard) for shard in shards(order(rows, batch, seed, processes, epoch), batch, processes)]
    steps = rows // (batch * processes)
    assert [len(batches) for batches in dealt] == [steps] * processes
    assert all(len(one) == batch for batches in dealt for one in batches)
    seen = [row for batches in dealt for one in batches for row in one]
    assert len(seen) == len(set(seen)) == len(order(rows, batch, seed, processes)) and set(seen) <= set(range(rows))


@MANY
@given(**SIZES, processes=st.integers(2, 6))
def test_a_step_has_the_rows_that_one_process_would_have_with_larger_batches(
    rows: int, batch: int, seed: int, processes: int
) -> None:
    if rows < batch * processes:
        return
    dealt = [list(shard) for shard in shards(order(rows, batch, seed, processes), batch, processes)]
    alone = BatchSampler(order(rows, batch * processes, seed, 1), batch * processes, False)
    for step, whole in zip(zip(*dealt, strict=True), alone, strict=False):
        assert [row for part in step for row in part] == whole


@MANY
@given(**SIZES, processes=st.integers(1, 4), done=st.integers(0, 30))
def test_an_epoch_is_the_same_again_and_can_be_entered_at_any_step(
    rows: int, batch: int, seed: int, processes: int, done: int
) -> None:
    if processes > 1 and rows < batch * processes:
        return
    straight = [list(shard) for shard in shards(order(rows, batch, seed, processes, 2), batch, processes)]
    again = shards(order(rows, batch, seed, processes, 2), batch, processes)
    for batches, shard in zip(straight, again, strict=True):
        assert [one for one in SkipBatchSampler(shard, done)] == batches[done:]


@MANY
@given(**SIZES)
def test_one_process_sees_every_row_once(rows: int, batch: int, seed: int) -> None:
    assert sorted(order(rows, batch, seed, 1)) == list(range(rows))


def test_rows_that_sit_out_are_others_in_the_next_epoch() -> None:
    def left_out(epoch: int) -> set[int]:
        return set(range(103)) - set(order(103, 4, 0, 5, epoch))

    assert len(left_out(0)) == 3 and left_out(0) != left_out(1)


def test_processes_of_a_step_have_rows_of_like_length() -> None:
    lengths = np.random.RandomState(0).randint(1, 500, 4000)
    rows = np.array(list(LengthGroupedOrder(lengths, 4, 0, 8)))
    steps = lengths[rows].reshape(-1, 8 * 4)
    padding = (steps.max(1, keepdims=True) - steps).sum() / steps.sum()
    assert padding < 0.1


def test_two_million_rows_are_ordered_without_a_list_of_them() -> None:
    lengths = np.ones(2_000_000, np.int64)
    rows: Iterator[int] = iter(LengthGroupedOrder(lengths, 16, 0, 8))
    first = [next(rows) for _ in range(1000)]
    assert len(set(first)) == 1000 and all(isinstance(row, int) for row in first)
