"""From a model and a task's images and prompts to unit vectors.

model       what is asked of a model
encode      images, shared by all ranks
classifier  prompts to class vectors
resize      what a protocol does to a picture first
cache       vectors kept by content
footprint   what a model costs and a measurement took
extract     a folder of pictures to a file of features
"""
