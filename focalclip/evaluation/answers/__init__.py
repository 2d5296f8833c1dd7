"""A model's answers to single images: kept, compared with another model's, told class by class.

predictions  the record and its file
pictures     thumbnails of the worst mistakes
per_class    recall and confusions of each class
compare      two models on the same images
"""
