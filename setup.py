"""For tools that ask for this file: all of the packaging is in pyproject.toml."""

from setuptools import setup

setup()
