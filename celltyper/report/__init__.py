"""The self-contained HTML report and overlay pictures."""
