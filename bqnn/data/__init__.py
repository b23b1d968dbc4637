"""Data sets: where they come from, how they are split, normalised and augmented."""
