"""Pods as people write them: which are taken, and what is said of the others.

Each file of tests/wild has the fields of an example of Kubernetes' own documentation
(kubernetes/website, content/en/examples/pods), in words of ours. Its first line is the verdict.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.model.errors import Error
from testbed.model.terms import Runtime
from testbed.pods import kubernetes
from tests.wild import MANIFESTS, STARTS, verdict


def found(file: Path) -> str:
    """What becomes of a manifest, in the words of its first line."""
    try:
        [spec] = kubernetes.read([file], lambda: Runtime.LINUX)
    except Error as e:
        return f"refused: {str(e).removeprefix(f'{file}, document 1').lstrip(',: ')}"
    programs = [w.program for w in spec.workloads if w.program]
    unknown = [p.image for p in programs if not p.image.startswith(("host:", "/"))]
    return f"needs an image: {unknown[0]}" if unknown else STARTS


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_the_verdict_is_as_written(file: Path) -> None:
    assert found(file) == verdict(file)


def test_most_are_taken() -> None:
    words = [verdict(file).partition(":")[0] for file in MANIFESTS]
    counts = {word: words.count(word) for word in sorted(set(words))}
    assert counts == {"needs an image": 5, "refused": 6, STARTS: 16}
