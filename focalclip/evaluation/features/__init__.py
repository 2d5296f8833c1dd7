"""Features of images and class vectors of prompts: encoded by threads and ranks, cached by content."""
