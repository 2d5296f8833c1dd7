"""Speed and exactness against peers: rows of ours and theirs, measured side by side in one run."""
