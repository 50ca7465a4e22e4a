"""Whole slides: reading at any resolution, and where on them is tissue."""

from celltyper.slides.ahead import read_ahead
from celltyper.slides.drawn import parse_region, read_mask, region_mask
from celltyper.slides.levels import Grid, Level
from celltyper.slides.opening import open_slide
from celltyper.slides.slide import Slide, require_mpp, slide_name
from celltyper.slides.tissue import TissueMask, tissue_mask, whole_slide

__all__ = [
    "Grid",
    "Level",
    "Slide",
    "TissueMask",
    "open_slide",
    "parse_region",
    "read_ahead",
    "read_mask",
    "region_mask",
    "require_mpp",
    "slide_name",
    "tissue_mask",
    "whole_slide",
]
