"""What is measured and how: data sets, their names and prompts, and the protocols.

tasks          data sets and benchmarks as typed records, from the files in tasks/
protocols      what decides a number besides the model and the images
shipped_names  lists that installed packages bring
names          a data folder's classes joined to a task's, by name
label_check    a warning where names seem to have changed places
"""
