"""Annotated images: readers, checks, training tiles."""
