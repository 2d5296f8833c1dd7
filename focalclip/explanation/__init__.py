"""What a FocalNet looks at: maps of gates, modulators and captions, and pictures of them."""
