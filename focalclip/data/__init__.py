"""Shards in and out: the default corpus, standard WebDataset shards and the loader that reads them."""
