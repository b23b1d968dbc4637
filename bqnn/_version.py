"""The version, written here and nowhere else: setup.py reads it, and so does the package."""

__version__ = "0.1.0"
