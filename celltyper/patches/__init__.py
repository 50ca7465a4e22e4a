"""Annotated windows, such as mitotic figures: what is read of them, and how they are cut."""
