"""Compares what a campaign stored of its plan with the git history of this clone.

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
        log = _git("log", "--reverse", "--diff-filter=AM", "--format=%h %cI", "--", file)
        for line in log.decode().splitlines():
            commit, date = line.split()
            text = _git("show", f"{commit}:{file}")
            if sha256(text).hexdigest() == campaign.plan["sha256"]:
                break
        else:
            return f"Could not be verified: no {file} in the git history here has that SHA-256."
    except (OSError, subprocess.CalledProcessError):
        return "Could not be verified: no git history here."
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
