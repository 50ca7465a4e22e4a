"""Patch mode: one class for every window, by an encoder and a head."""
