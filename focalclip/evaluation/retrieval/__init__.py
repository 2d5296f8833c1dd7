"""Image-text retrieval: recall@K both ways, with several captions per image, at any size.

pairs     images and the captions that belong to them, from any source that has captions
ranking   rank of the best right answer, block by block
recall    recall, interval, chance level, ceiling; mean reciprocal rank
evaluate  the whole run for a model
result    the numbers as JSON, as a table, and the ranks as a file
"""

from focalclip.evaluation.retrieval.pairs import PairData, open_pairs
from focalclip.evaluation.retrieval.ranks import Ranks, retrieval_ranks
from focalclip.evaluation.retrieval.result import RetrievalResult
from focalclip.evaluation.retrieval.run import evaluate

__all__ = ["PairData", "Ranks", "RetrievalResult", "evaluate", "open_pairs", "retrieval_ranks"]
