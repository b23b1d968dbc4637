"""Experiments: recipes, training, runs, evaluation."""
