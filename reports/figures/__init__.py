"""One function a figure: points in, a matplotlib figure out; nothing is shown or written here.

Points are pairs of a comparison, or the dicts that ``predict`` and ``measure`` write. matplotlib is
imported when a figure is made, never when this package is imported.
"""

from reports.figures.breakdown import breakdown as breakdown
from reports.figures.curves import cost as cost
from reports.figures.curves import curve as curve
from reports.figures.curves import energy as energy
from reports.figures.curves import max_batch as max_batch
from reports.figures.curves import throughput as throughput
from reports.figures.curves import tpot as tpot
from reports.figures.curves import ttft as ttft
from reports.figures.errors import error_by as error_by
from reports.figures.errors import error_scatter as error_scatter
from reports.figures.memory import memory as memory
from reports.figures.pareto import pareto as pareto
from reports.figures.roofline import roofline as roofline
from reports.figures.side_by_side import side_by_side as side_by_side
from reports.figures.style import NARROW as NARROW
from reports.figures.style import WIDE as WIDE
from reports.figures.style import save_figure as save_figure
