"""End-to-end serving under a constant load: time per output token, unloaded time to first token.

A row's time to first token is under load; what is predicted is the unloaded one, so that metric
says how far a queue model is needed and is not part of the overall figures.
"""

from collections.abc import Sequence

from costmodel.validation.cells import observed_value
from costmodel.validation.end_to_end import grouped_rows, predicted_blocks
from costmodel.validation.kinds import Options
from costmodel.validation.result import Block, Predictions
from costmodel.validation.serving_rows import read_rows
from costmodel.validation.table import Record

#: Metric -> column with milliseconds.
COLUMNS = {"tpot": "silicon_tpot_ms", "ttft_unloaded": "silicon_ttft_ms"}


def predict(records: Sequence[Record], options: Options) -> Predictions:
    """Seconds per output token of every row, and of the first."""
    grouped, unread = grouped_rows(records, read_rows)
    blocks, unsupported = predicted_blocks(grouped, options, all_parts=True)
    return Predictions(
        blocks=tuple(blocks),
        unsupported=(*unread, *unsupported),
        assumptions=(
            "time to first token is predicted unloaded: what a request waits for others needs a "
            "queue model",
        ),
    )


def observed(record: Record, block: Block) -> float:
    """Milliseconds of the block's metric as seconds."""
    return observed_value(record, COLUMNS[block.group["metric"]]) * 1e-3
