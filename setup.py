"""Everything about the package is in pyproject.toml; the compiled extension of csrc/ will be built from here."""

from setuptools import setup

setup()
