"""A result with the seconds that it took, since a row of the results has them."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")


class Timed(NamedTuple, Generic[Value]):
    """A value, and the seconds that computing it alone would take."""

    value: Value
    seconds: float
