import math
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.columns import (
    Timestamp,
    escape_text,
    pack_ids,
    pack_logprobs,
    pack_mask,
    unescape_text,
    unpack_ids,
    unpack_logprobs,
    unpack_mask,
)


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_ids_round_trip(ids):
    assert unpack_ids(pack_ids(ids)) == tuple(ids)


def test_an_id_too_large_is_refused_not_wrapped():
    with pytest.raises(OverflowError):
        pack_ids([2**31])


@given(st.lists(st.booleans()))
def test_mask_round_trip(mask):
    assert unpack_mask(pack_mask(mask)) == tuple(mask)
    assert all(type(value) is bool for value in unpack_mask(pack_mask(mask)))


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_float32_logprobs_round_trip_bit_by_bit(logprobs):
    found = unpack_logprobs(pack_logprobs(logprobs))
    assert np.array(found, "<f8").tobytes() == np.array(logprobs, "<f8").tobytes()


def test_float64_logprobs_are_rounded_to_float32():
    assert unpack_logprobs(pack_logprobs([-0.1])) == (float(np.float32(-0.1)),)
    assert math.isnan(unpack_logprobs(pack_logprobs([math.nan]))[0])


any_text = st.text(st.characters(codec=None) | st.sampled_from("\0\x1a\ud800abc019f"))


@given(any_text)
def test_any_text_is_storable_and_comes_back(text):
    stored = escape_text(text)
    assert "\0" not in stored
    stored.encode()
    assert unescape_text(stored) == text


zones = st.integers(-720, 720).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(st.datetimes(datetime(1971, 1, 1), datetime(9000, 1, 1), timezones=st.none() | zones))
def test_times_round_trip(time):
    stored = Timestamp().process_bind_param(time, None)
    assert len(stored) <= 32
    assert Timestamp().process_result_value(stored, None) == time
