"""Image-text retrieval: recall@K both ways, with several captions per image, at any size.

pairs    images and the captions that belong to them, from any source that has captions
ranks    rank of the best right answer, block by block
recall   recall, interval, chance level, ceiling; mean reciprocal rank
run      the whole run for a model
result   the numbers as JSON and as a table, and the ranks as a file; needs no torch
"""
