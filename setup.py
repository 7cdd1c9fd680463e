"""Everything is declared in pyproject.toml; this file is where compiled extensions are added to the build."""

from setuptools import setup

setup()
