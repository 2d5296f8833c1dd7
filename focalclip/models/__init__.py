"""Image towers, text towers and the two together."""
