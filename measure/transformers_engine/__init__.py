"""The same point run by Hugging Face transformers: its model classes and its caches.

models.py   a model with random weights, checked against the parameter count
caches.py   which of its cache classes realises which method
state.py    bytes of whatever a cache holds; putting it back after a step
session.py  what ``measure.observation`` drives
"""
