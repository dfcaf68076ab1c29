"""The one place that states the version; pyproject.toml, setup.py and both packages read it."""

__version__ = "0.1.0"
