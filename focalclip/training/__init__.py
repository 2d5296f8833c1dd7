"""Training under DeepSpeed, from one configuration."""
