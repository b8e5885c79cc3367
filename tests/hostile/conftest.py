"""Pods that the tests attack: those of the integration tests."""

from tests.integration.conftest import build, owner, prepared

__all__ = ["build", "owner", "prepared"]
