"""Timings, and the study of quality; each runs as a module from the root of the repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The root of the repository."""
