"""Tests in several processes: the list of long files is true."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import processes


@pytest.mark.parametrize("file", processes.LONG)
def test_a_file_that_takes_long_exists(file: str) -> None:
    assert Path(processes.__file__).parent.joinpath(file).is_file()
