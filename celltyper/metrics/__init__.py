"""Scores of labels and phenotypes, with intervals."""
