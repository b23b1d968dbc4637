"""From a trained Bayes network to one that runs."""
