"""One function a figure: pairs in, a matplotlib figure out; nothing is shown or written here.

matplotlib is imported when a figure is made, never when this package is imported.
"""

from reports.figures.roofline import roofline as roofline
from reports.figures.style import NARROW as NARROW
from reports.figures.style import WIDE as WIDE
from reports.figures.style import save_figure as save_figure
