"""The order is a bijection per epoch, a pure function of the row number, and its shares are the weights."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.refusal import Refusal
from data.mixture import Mixture, MixturePhase, MixtureSettings
from data.order import Order, OrderSettings, SourceShape, permute

shapes = st.builds(SourceShape, rows=st.integers(1, 700), rows_per_block=st.integers(1, 70))


def order_of(*shapes: SourceShape, mixture: MixtureSettings | None = None, seed: int = 0, window: int = 4) -> Order:
    names = {f"source-{i}": shape for i, shape in enumerate(shapes)}
    return Order(names, seq_len=8, settings=OrderSettings(seed=seed, window_blocks=window), mixture=mixture)


@settings(derandomize=True, deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_the_keyed_permutation_is_a_bijection_and_inverts(size: int, key: int) -> None:
    index = np.arange(size, dtype=np.uint64)
    keys = np.full(size, key, dtype=np.uint64)
    image = permute(index, np.uint64(size), keys)
    assert sorted(image.tolist()) == list(range(size))
    assert (permute(image, np.uint64(size), keys, inverse=True) == index).all()


def test_all_permutations_of_four_come_up_about_equally_often() -> None:
    tries = 4800
    seen = Counter(
        tuple(permute(np.arange(4, dtype=np.uint64), np.uint64(4), np.full(4, key, dtype=np.uint64)).tolist())
        for key in range(tries)
    )
    assert set(seen) == set(permutations(range(4)))
    # 200 expected of each; a network of six rounds is no ideal cipher, so allow a third either way.
    assert min(seen.values()) > 130
    assert max(seen.values()) < 270


@settings(derandomize=True, deadline=None)
@given(shape=shapes, window=st.integers(1, 20), seed=st.integers(0, 9))
def test_each_epoch_has_every_row_once_and_another_order(shape: SourceShape, window: int, seed: int) -> None:
    order = order_of(shape, seed=seed, window=window)
    located = order.locate(np.arange(3 * shape.rows))
    epochs = located.row.reshape(3, shape.rows)
    assert (located.epoch.reshape(3, shape.rows) == np.arange(3)[:, None]).all()
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(shape.rows))
    if shape.rows > 50 and (window > 1 or shape.rows_per_block > 20):
        assert (epochs[0] != epochs[1]).any()


@settings(derandomize=True, deadline=None)
@given(shape=shapes, window=st.integers(1, 20))
def test_a_window_draws_from_its_own_blocks_only(shape: SourceShape, window: int) -> None:
    blocks_of_row = order_of(shape, window=window).locate(np.arange(shape.rows)).row // shape.rows_per_block
    changes = np.flatnonzero(np.diff(blocks_of_row)) + 1
    last_seen = {block: i for i, block in enumerate(blocks_of_row.tolist())}
    first_seen = {block: i for i, block in reversed(list(enumerate(blocks_of_row.tolist())))}
    for position in changes.tolist():
        open_blocks = [b for b in first_seen if first_seen[b] <= position <= last_seen[b]]
        assert len(open_blocks) <= window


@settings(derandomize=True, deadline=None)
@given(data=st.data(), shape=shapes, other=shapes)
def test_any_rows_in_any_order_give_what_the_whole_run_gives(
    data: st.DataObject, shape: SourceShape, other: SourceShape
) -> None:
    mixture = MixtureSettings(phases=(MixturePhase(weights={"source-0": 0.3, "source-1": 0.7}),))
    order = order_of(shape, other, mixture=mixture)
    whole = order.locate(np.arange(2000))
    some = np.array(data.draw(st.lists(st.integers(0, 1999), min_size=1, max_size=20)))
    alone = order.locate(some)
    assert (alone.source == whole.source[some]).all()
    assert (alone.epoch == whole.epoch[some]).all()
    assert (alone.row == whole.row[some]).all()


def test_neighbours_in_the_corpus_do_not_stay_neighbours() -> None:
    rows = order_of(SourceShape(rows=64 * 1000, rows_per_block=64), window=256).locate(np.arange(64 * 1000)).row
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.01
    # A batch of 64 rows draws from dozens of blocks, as random draws from a window of 256 would.
    blocks = [len(set((batch // 64).tolist())) for batch in rows.reshape(-1, 64)]
    assert np.mean(blocks) > 50


def test_seed_changes_the_order_and_another_source_does_not() -> None:
    shape = SourceShape(rows=500, rows_per_block=16)
    assert (order_of(shape).locate(np.arange(500)).row != order_of(shape, seed=1).locate(np.arange(500)).row).any()
    both = order_of(shape, shape, mixture=MixtureSettings(phases=(MixturePhase(weights={"source-0": 1.0}),)))
    assert (both.locate(np.arange(500)).row == order_of(shape).locate(np.arange(500)).row).all()
    assert both.digest != order_of(shape).digest


def test_the_order_is_the_one_it_was() -> None:
    """A change here silently reorders every run in progress: raise ORDER_VERSION with it."""
    mixture = MixtureSettings(phases=(MixturePhase(weights={"source-0": 1, "source-1": 2}),))
    order = order_of(
        SourceShape(rows=100, rows_per_block=8), SourceShape(rows=77, rows_per_block=8), mixture=mixture, seed=7
    )
    located = order.locate(np.array([0, 1, 2, 3, 1000, 10**9, 10**15]))
    assert located.source.tolist() == [1, 0, 1, 1, 0, 0, 0]
    assert located.epoch.tolist() == [0, 0, 0, 0, 3, 3333333, 3333333333333]
    assert located.row.tolist() == [33, 19, 32, 45, 16, 53, 17]


weights = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 3.0, 1 / 3]), min_size=1, max_size=5).filter(any)


@settings(derandomize=True, deadline=None)
@given(weights=weights, rows=st.integers(1, 5000))
def test_shares_stay_within_their_bound_at_every_row(weights: list[float], rows: int) -> None:
    names = {f"s{i}": 10 for i in range(len(weights))}
    phase = MixturePhase(weights=dict(zip(names, weights, strict=True)))
    mixture = Mixture(MixtureSettings(phases=(phase,)), names, seq_len=1)
    source, nth = mixture.locate(np.arange(rows))
    for number, weight in enumerate(weights):
        share = weight / sum(weights)
        mine = source == number
        counted = np.cumsum(mine)
        # The bound of the layout, and 1e-5 of the rows for weights that had to be rounded.
        bound = 0.5 + share * len(weights) / 2 + 1e-5 * rows + 1e-9
        assert np.abs(counted - share * np.arange(1, rows + 1)).max() <= bound
        assert nth[mine].tolist() == list(range(int(mine.sum())))
    assert mixture.rows_before(rows) == np.bincount(source, minlength=len(weights)).tolist()


def test_weights_change_at_the_token_count_they_are_told() -> None:
    settings_ = MixtureSettings(
        phases=(
            MixturePhase(weights={"a": 1.0}),
            MixturePhase(from_tokens=1001, weights={"a": 1.0, "b": 3.0}),
            MixturePhase(from_tokens=4000, weights={"b": 1.0}),
        )
    )
    mixture = Mixture(settings_, {"a": 10, "b": 10}, seq_len=10)
    source, nth = mixture.locate(np.arange(1000))
    # Row 100 starts at token 1000, before 1001; row 101 is the first of the new phase.
    assert not source[:101].any()
    assert source[101:401].sum() in (224, 225, 226)
    assert source[400:].all()
    for number in (0, 1):
        assert nth[source == number].tolist() == list(range(int((source == number).sum())))
    assert sum(mixture.rows_before(777)) == 777


def test_without_phases_sources_come_in_proportion_to_their_size() -> None:
    order = order_of(SourceShape(rows=300, rows_per_block=8), SourceShape(rows=100, rows_per_block=8))
    located = order.locate(np.arange(400))
    assert np.bincount(located.source).tolist() == [300, 100]
    assert not located.epoch.any()


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ([MixturePhase(weights={"source-9": 1.0})], "source-9"),
        ([MixturePhase(weights={"source-0": -1.0})], "source-0 = -1.0"),
        ([MixturePhase(weights={"source-0": 0.0})], "no weight is above 0"),
        ([MixturePhase(from_tokens=5, weights={"source-0": 1.0})], "first must start at 0"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_with_its_reason(phases: list[MixturePhase], says: str) -> None:
    with pytest.raises(Refusal, match=says):
        order_of(SourceShape(rows=10, rows_per_block=2), mixture=MixtureSettings(phases=tuple(phases)))
