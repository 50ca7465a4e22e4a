"""Trained models to be found by name: those in the box, and those in the user's cache."""
