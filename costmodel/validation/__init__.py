"""Predict every row of a table of published measurements and report the error.

Nothing is fitted here, and predictions are a function of the shape columns alone: the observed
column is read after them, by another function, and only to be compared.
"""

from costmodel.validation.kinds import KIND_NAMES as KIND_NAMES
from costmodel.validation.result import Validation as Validation
from costmodel.validation.run import validate as validate
