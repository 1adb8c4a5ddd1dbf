"""A model shared by several processes, each a GPU (or, on a CPU, a process with Gloo).

shards.py    what of every tensor a rank holds
decoder.py   the decoder with a sum over ranks behind every block
session.py   what ``measure.observation`` drives in every rank
ranks.py     starts the ranks through torchrun's launcher and joins what they observed
"""
