"""Fixtures of several test files."""

from op_tools import backend  # noqa: F401
