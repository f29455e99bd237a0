"""How values that no database type fits are laid down: token arrays, any text, JSON, times and wide integers.

All of these round-trip exactly and look the same in SQLite and PostgreSQL.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from array import array
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Dialect, String, Text
from sqlalchemy.types import TypeDecorator

_LEVEL = 1  # zlib's fastest: what it leaves larger is a few percent of a store


def pack_ids(ids: Sequence[int]) -> bytes:
    """Token ids as zlib-compressed little-endian int32.

    Raises:
        OverflowError: an id does not fit 32 bits.
    """
    return zlib.compress(_little(array("i", ids)).tobytes(), _LEVEL)


def unpack_ids(blob: bytes) -> tuple[int, ...]:
    """Inverse of `pack_ids`."""
    return tuple(_little(array("i", zlib.decompress(blob))))


def pack_mask(mask: Sequence[bool]) -> bytes:
    """A loss mask as zlib-compressed uint8, one byte a token before compression."""
    return zlib.compress(bytes(map(bool, mask)), _LEVEL)


def unpack_mask(blob: bytes) -> tuple[bool, ...]:
    """Inverse of `pack_mask`."""
    return tuple(map(bool, zlib.decompress(blob)))


def pack_logprobs(logprobs: Sequence[float]) -> bytes:
    """Log-probabilities as zlib-compressed little-endian float32: exact for values that came from float32."""
    return zlib.compress(_little(array("f", logprobs)).tobytes(), _LEVEL)


def unpack_logprobs(blob: bytes) -> tuple[float, ...]:
    """Inverse of `pack_logprobs`, up to its rounding to float32."""
    return tuple(_little(array("f", zlib.decompress(blob))))


def _little(values: array[Any]) -> array[Any]:
    """The same numbers in the other byte order on machines that are not little-endian."""
    if sys.byteorder == "big":
        values.byteswap()
    return values


_ESCAPE = "\x1a"
_UNSAFE = re.compile("[\x00\x1a\ud800-\udfff]")
_ESCAPED = re.compile("\x1a([0-9a-f]{4})")


def escape_text(text: str) -> str:
    """Make any Python string storable: NUL (PostgreSQL refuses it) and lone surrogates become 0x1A + 4 hex digits."""
    return _UNSAFE.sub(lambda match: f"{_ESCAPE}{ord(match[0]):04x}", text)


def unescape_text(text: str) -> str:
    """Inverse of `escape_text`."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text) if _ESCAPE in text else text


class AnyText(TypeDecorator[str]):
    """Text that may hold any code point, whatever a model or a game wrote."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """Escape on the way in."""
        return None if value is None else escape_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        """Unescape on the way out."""
        return None if value is None else unescape_text(value)


class JsonText(TypeDecorator[Any]):
    """A JSON value as ASCII text; key order is kept, tuples come back as lists."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Write compact JSON."""
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Read JSON."""
        return None if value is None else json.loads(value)


class Timestamp(TypeDecorator[datetime]):
    """An ISO 8601 time with microseconds, moved to UTC, so that text order is time order. Naive times stay naive."""

    impl = String(32)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> str | None:
        """Write in UTC."""
        if value is None:
            return None
        return (value.astimezone(UTC) if value.tzinfo else value).isoformat(timespec="microseconds")

    def process_result_value(self, value: str | None, dialect: Dialect) -> datetime | None:
        """Read as it was written."""
        return None if value is None else datetime.fromisoformat(value)


class WideInteger(TypeDecorator[int]):
    """An integer of any size, such as a seed taken from a digest, in decimal."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> str | None:
        """Write in decimal."""
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> int | None:
        """Read decimal."""
        return None if value is None else int(value)
