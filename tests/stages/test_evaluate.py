"""Claims about held-out scores: windows, intervals, baselines, selection, and the stage as a whole."""

from __future__ import annotations

import lzma
import math
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.stages.baselines import gzip_bytes, token_counts, unigram_nats, xz_bytes
from pipelines.stages.intervals import interval, mean_interval, resample_sums
from pipelines.stages.scoring import sliding_windows


@given(tokens=st.integers(1, 200), context=st.integers(1, 40), data=st.data())
def test_every_token_after_the_first_is_scored_once_with_the_promised_context(tokens, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for window in sliding_windows(tokens, context_tokens=context, stride_tokens=stride):
        assert 1 <= window.tokens <= context
        for position in range(window.scored_from, window.end):
            scored.append(position + 1)
            assert position - window.start + 1 >= min(position + 1, context - stride + 1)
    assert scored == list(range(1, tokens))


def test_rolling_windows_are_those_of_the_harness():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count in (1, 4, 5, 11, 12, 13, 40):
        text = list(range(100, 100 + count))
        theirs = [
            (len(inputs) + len(targets) - 1 if False else targets)
            for inputs, targets in map(
                make_disjoint_window,
                get_rolling_token_windows(token_list=text, prefix_token=1, max_seq_len=4, context_len=1),
            )
        ]
        ids = [1, *text]
        ours = [
            ids[window.scored_from + 1 : window.end + 1]
            for window in sliding_windows(len(ids), context_tokens=4, stride_tokens=4)
        ]
        assert ours == theirs


def test_a_prompt_too_long_loses_its_beginning():
    [window] = sliding_windows(30, context_tokens=8, stride_tokens=8, first=25)
    assert (window.start, window.scored_from, window.end) == (21, 25, 29)


def test_xz_size_is_that_of_the_command_with_its_full_window():
    for text in (b"", b"a", b"def f():\n    return 1\n" * 400, bytes(range(256)) * 40):
        assert xz_bytes(text) == len(lzma.compress(text, format=lzma.FORMAT_XZ, preset=9))


def test_gzip_size_is_close_to_the_commands():
    text = "".join(f"line {i * i} of a text\n" for i in range(2000)).encode()
    command = subprocess.run(["gzip", "-9", "-c"], input=text, capture_output=True, check=True).stdout
    assert abs(gzip_bytes(text) - len(command)) <= 0.01 * len(command)


def test_unigram_nats_are_the_entropy_of_the_counts():
    documents = [[0, 1, 1, 2], [1, 1]]
    own = token_counts(documents, 4)
    total = sum(unigram_nats(own, documents, added=0))
    p = np.array([1, 4, 1]) / 6
    assert total == pytest.approx(-6 * (p * np.log(p)).sum())
    assert unigram_nats(own, [[3]], added=1) == pytest.approx([math.log(10 / 1)])
    assert sum(unigram_nats(own, documents, added=1)) > total


def test_bootstrap_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sizes = rng.lognormal(3, 0.7, 120)
        bits = sizes * rng.normal(2.0, 0.3, 120)
        draws = resample_sums(np.column_stack([bits, sizes]), resamples=200, seed=trial)
        found = interval(bits.sum() / sizes.sum(), draws[:, 0] / draws[:, 1])
        covered += found.low <= 2.0 <= found.high
    # 95 % of 200, give or take three standard deviations of a binomial and the bootstrap's known optimism
    assert 200 * 0.95 - 3 * math.sqrt(200 * 0.95 * 0.05) - 6 <= covered <= 200


def test_bootstrap_is_a_function_of_its_seed():
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean_interval(values, resamples=50, seed=1) == mean_interval(values, resamples=50, seed=1)
    other = resample_sums(np.array(values)[:, None], resamples=50, seed=2)
    assert (resample_sums(np.array(values)[:, None], resamples=50, seed=1) != other).any()
