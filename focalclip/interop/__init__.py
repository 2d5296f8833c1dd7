"""Other libraries: models and weights of theirs behind our interface, and ours in their formats; one file each."""
