"""Holds what a campaign stored of its plan to the git history of this clone.

The plan's file is looked for among all versions that were committed, by the SHA-256 that the
campaign stored before its first trial. So it is seen whether claims were laid down before the data,
as far as dates of commits are to be trusted.
"""

from __future__ import annotations

import subprocess
from datetime import datetime
from hashlib import sha256

from testbed import paths, plan
from testbed.model.errors import Error
from testbed.results.store import Campaign


def verified(campaign: Campaign) -> str:
    """A line on when the plan of a preregistered campaign was committed; empty for others."""
    laid_down = plan.preregistration_of(campaign.plan)
    if laid_down is None:
        return ""
    file = f"{paths.EXPERIMENTS.name}/{campaign.name}.toml"
    try:
        versions = _git("log", "--reverse", "--format=%h %cI", "--", file).decode().splitlines()
        texts = {version: _git("show", f"{version.split()[0]}:{file}") for version in versions}
    except (OSError, subprocess.CalledProcessError):
        return "Could not be verified: no git history here."
    same = [v for v in versions if sha256(texts[v]).hexdigest() == campaign.plan["sha256"]]
    if not same:
        return f"Could not be verified: no {file} in the git history here has that SHA-256."
    (commit, date), text = same[0].split(), texts[same[0]]
    try:
        found = plan.parse(text.decode(), f"{file} of {commit}")
    except Error as e:
        return f"Could not be verified: {e.message}."
    if (found.claims, found.preregistration) != (plan.claims_of(campaign.plan), laid_down):
        return f"Not what was laid down: claims differ from those of {file} at {commit}."
    early = datetime.fromisoformat(date) < datetime.fromisoformat(campaign.started)
    when = "before" if early else "after"
    about = "which follows" if _follows(commit, laid_down.revision) else "which does not follow"
    return (
        f"The plan was committed at {commit}, {about} {laid_down.revision}, on {date}, "
        f"{when} the first trial."
    )


def _follows(commit: str, revision: str) -> bool:
    """Whether a commit has the revision among its ancestors."""
    try:
        _git("merge-base", "--is-ancestor", revision, commit)
    except subprocess.CalledProcessError:
        return False
    return True


def _git(*arguments: str) -> bytes:
    """What git prints. Raises `OSError` without git, `CalledProcessError` if it fails."""
    command = ["git", "-C", str(paths.ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True).stdout
