"""Packed networks in files."""
