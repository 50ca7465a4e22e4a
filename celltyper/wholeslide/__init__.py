"""Whole slides: tiles, stitched maps, cells block by block; exact, resumable, bounded in memory."""

from celltyper.wholeslide.plan import BLOCK, Plan, make_plan
from celltyper.wholeslide.running import Pool, cluster_pool, local_pool, process_pool
from celltyper.wholeslide.slide import infer_slide
from celltyper.wholeslide.worker import ModelSource

__all__ = [
    "BLOCK",
    "ModelSource",
    "Plan",
    "Pool",
    "cluster_pool",
    "infer_slide",
    "local_pool",
    "make_plan",
    "process_pool",
]
