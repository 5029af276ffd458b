"""The version of the installed distribution."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    """Such as ``2026.11.0``; ``source`` when run from a folder that was not installed."""
    try:
        return metadata.version("tidar-server")
    except metadata.PackageNotFoundError:
        return "source"
