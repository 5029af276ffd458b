"""Which commit a number belongs to, also where there is no git."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from benchmarks import report


@pytest.fixture(params=["no program", "no history", "hangs"])
def no_git(request, monkeypatch, tmp_path):
    """A copy of the source whose history git cannot tell."""

    def run(command, **options):
        if request.param == "no program":
            raise FileNotFoundError(command[0])
        if request.param == "hangs":
            raise subprocess.TimeoutExpired(command, 20)
        return subprocess.CompletedProcess(command, 128, "", "fatal: not a git repository")

    monkeypatch.setattr(report.subprocess, "run", run)
    monkeypatch.delenv(report.COMMIT_VARIABLE, raising=False)
    return tmp_path


def test_a_copy_without_history_says_its_commit(no_git, monkeypatch):
    assert report.commit(no_git) == "unknown"
    (no_git / "COMMIT").write_text("0123456789ab\n")
    assert report.commit(no_git) == "0123456789ab"
    monkeypatch.setenv(report.COMMIT_VARIABLE, "ba9876543210")
    assert report.commit(no_git) == "ba9876543210"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_git_is_asked_first(monkeypatch, tmp_path):
    monkeypatch.setenv(report.COMMIT_VARIABLE, "another")
    author = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), (*author, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert report.commit(tmp_path) == head[:12]
