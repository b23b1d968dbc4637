"""Bayes layers and what is done with networks of them: converting, the objective, BatchNorm statistics, predicting."""
