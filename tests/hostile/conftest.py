"""Pods for attempts: those of the integration tests, and one that guests are attached to."""

from tests.integration.conftest import build, owner, prepared

__all__ = ["build", "owner", "prepared"]
