"""Training in the three phases of the recipe: what the command and bqnn.fit have in common, and bqnn.fit."""
