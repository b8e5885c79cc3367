# SPDX-License-Identifier: Apache-2.0
"""Orders of a controller: their keys, and the exception for a refused one (order.c)."""

from __future__ import annotations

from typing import Any

Keys = dict[str, Any]
"""The JSON object of an order or of an answer.

If a key is missing or a value has the wrong type, `LookupError`, `TypeError` or `ValueError` is
raised where it is used, and `main` makes it the answer.
"""


class Refused(Exception):
    """An order is refused; the text is the reason."""
