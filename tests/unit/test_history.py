"""Whether claims were laid down before the data is seen in git, or said to be unknown."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from testbed import paths
from testbed.reports import history
from testbed.results.store import Campaign
from tests.unit import test_claims

BEFORE, AFTER = "2026-11-01T00:00:00+00:00", "2026-11-03T00:00:00+00:00"
COMMITTED = "2026-11-02T00:00:00+00:00"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty clone, in the place of this one."""
    folder = tmp_path / "clone"
    (folder / "experiments").mkdir(parents=True)
    monkeypatch.setattr(paths, "ROOT", folder)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_DATE", COMMITTED)
        monkeypatch.setenv(f"GIT_{name}_NAME", "a")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b")
    return folder


def git(clone: Path, *arguments: str) -> str:
    command = ["git", "-C", str(clone), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def committed(clone: Path, tmp_path: Path) -> Campaign:
    """A campaign of a plan that was committed, and later changed."""
    git(clone, "init", "-q")
    git(clone, "commit", "-q", "--allow-empty", "-m", "the code")
    text = test_claims.PLAN.replace("0123abc", git(clone, "rev-parse", "--short=9", "HEAD"))
    for content in (text, text + "# later\n"):
        (clone / "experiments/tiny.toml").write_text(content)
        git(clone, "add", ".")
        git(clone, "commit", "-q", "-m", "the plan")
    made = test_claims.campaign(tmp_path / "out", 0.001, text).campaign
    stored = {**made.plan, "sha256": sha256(text.encode()).hexdigest()}
    return replace(made, plan=stored, started=AFTER)


def test_a_plan_that_was_committed_before_the_first_trial_is_found(
    clone: Path, tmp_path: Path
) -> None:
    campaign = committed(clone, tmp_path)
    commit = git(clone, "rev-parse", "--short", "HEAD~1")
    said = history.verified(campaign)
    assert said.startswith(f"The plan was committed at {commit}, which follows ")
    assert said.endswith("before the first trial.")
    assert history.verified(replace(campaign, started=BEFORE)).endswith("after the first trial.")


def test_claims_that_were_changed_in_the_campaign_are_found(clone: Path, tmp_path: Path) -> None:
    campaign = committed(clone, tmp_path)
    changed = {**campaign.plan, "claims": campaign.plan["claims"][:1]}
    said = history.verified(replace(campaign, plan=changed))
    assert said.startswith("Not what was laid down: claims differ")
    other = {**campaign.plan, "sha256": "0" * 64}
    assert "has that SHA-256" in history.verified(replace(campaign, plan=other))


def test_a_revision_that_the_plan_does_not_follow_is_said(clone: Path, tmp_path: Path) -> None:
    campaign = committed(clone, tmp_path)
    git(clone, "commit", "-q", "--allow-empty", "-m", "later code")
    text = (clone / "experiments/tiny.toml").read_text()
    head = git(clone, "rev-parse", "--short=9", "HEAD")
    old = campaign.plan["preregistration"]["revision"]
    git(clone, "checkout", "-q", "--orphan", "rewritten")
    (clone / "experiments/tiny.toml").write_text(text := text.replace(old, head))
    git(clone, "commit", "-q", "-am", "the plan, with another past")
    made = test_claims.campaign(tmp_path / "again", 0.001, text).campaign
    plan = {**made.plan, "sha256": sha256(text.encode()).hexdigest()}
    said = history.verified(replace(made, plan=plan, started=AFTER))
    assert f"which does not follow {head}" in said


def test_without_git_nothing_is_verified_and_it_says_so(clone: Path, tmp_path: Path) -> None:
    campaign = test_claims.campaign(tmp_path / "out", 0.001).campaign
    assert history.verified(campaign) == "Could not be verified: no git history here."
    assert history.verified(replace(campaign, plan={})) == ""
