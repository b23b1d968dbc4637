"""Packed layers, and what decides how each of them runs."""
