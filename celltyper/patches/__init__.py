"""One label per window: mitotic figures and other cells typed by the patch around them."""
