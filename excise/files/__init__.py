"""Files: what users write in YAML, and what work leaves on disk to be used again.

Here: the one reader of registries, and files of tensors, of rows and of unfinished work, which appear under their names
only when they are whole. Not here: what an entry means (`models`, `strategies`, `scenarios`, `outcomes`), what a file
is addressed by (whoever keeps it), and the warehouse (`resources`).
"""
