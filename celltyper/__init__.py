"""Finds every nucleus on an H&E image, outlines it and names its phenotype."""

__version__ = "0.1.0"
