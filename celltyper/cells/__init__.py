"""One row per cell: measuring, outlines, tables, exports."""
