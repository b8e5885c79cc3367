# SPDX-License-Identifier: Apache-2.0
"""What the orders of a controller have in common (order.c)."""

from __future__ import annotations

from typing import Any

Keys = dict[str, Any]
"""The JSON object of an order or of an answer.

A missing key or a value of the wrong type raises `LookupError`, `TypeError` or `ValueError` where
it is used; `main` makes the answer of it.
"""


class Refused(Exception):
    """An order that is not carried out, and why."""
