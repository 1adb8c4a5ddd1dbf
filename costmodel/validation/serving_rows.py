"""Rows of end-to-end serving tables: which deployment a row means, and its load.

The parallel degrees of published rows need reading. Rows that come from sweeps often multiply
degrees twice (tp_size = tp x ep, or moe_ep_size = dp x ep): where tp_size x attention_dp_size is
the square of the tp that the row's id names (or, in ids without one, of the experts' degree), the
replica has the root of it as GPUs and as expert groups. Ids also name an ep that the columns leave
at 1. A concurrency that is a multiple of batch_size means ranks with a batch each.
"""

import math
import re

from costmodel.errors import NotApplicableError
from costmodel.serving import Deployment
from costmodel.validation.cases import Case, Row
from costmodel.validation.cells import number, whole
from costmodel.validation.names import engine_named, precision_named
from costmodel.validation.table import Record

#: Larger replicas in these tables are multi-node or disaggregated, and the row does not say how.
MOST_GPUS = 8


def read_rows(record: Record, index: int) -> tuple[Case, list[Row]]:
    """The deployment of a row, and its two metrics.

    Raises ``ConfigError`` for a cell that cannot be read, ``NotApplicableError`` for a row whose
    deployment is not known.
    """
    deployment = _deployment(record)
    if deployment.n_gpus > MOST_GPUS:
        raise NotApplicableError(
            f"more than {MOST_GPUS} GPUs: multi-node or disaggregated, and the row does not say how"
        )
    if whole(record, "pp_size", 1) > 1:
        raise NotApplicableError("pipeline parallelism in serving has no model here")
    given = record.get("precision", "") or record.get("gemm_quant_mode", "")
    shown = record.get("backend", "").lower()
    case = Case(
        model=record.get("model_path", ""),
        system=record.get("system", ""),
        engine=engine_named(shown),
        shown=shown,
        precision=precision_named(given, "precision"),
        deployment=deployment,
    )
    if record.get("concurrency"):
        concurrency = number(record, "concurrency")
    else:
        concurrency = number(record, "batch_size") * deployment.dp
    prompt, output = number(record, "isl"), number(record, "osl")
    return case, [
        Row(
            index=index,
            metric="tpot",
            label="tpot",
            concurrency=concurrency,
            input_tokens=prompt,
            output_tokens=output,
        ),
        Row(
            index=index,
            metric="ttft",
            label="ttft_unloaded",
            concurrency=float(deployment.dp),
            input_tokens=prompt,
            output_tokens=output,
            primary=False,
        ),
    ]


def _deployment(record: Record) -> Deployment:
    tp = whole(record, "tp_size", 1)
    dp = whole(record, "attention_dp_size", 1)
    moe_tp, ep = whole(record, "moe_tp_size", 1), whole(record, "moe_ep_size", 1)
    if tp == 0 or (dp == 0 and ep == 0):
        raise NotApplicableError("parallel sizes of 0: the row does not say how it was spread")
    dp, moe_tp, ep = max(dp, 1), max(moe_tp, 1), max(ep, 1)
    named_tp, named_ep = _named(record, "tp"), _named(record, "ep")
    root = math.isqrt(tp * dp)
    if _is_doubled(tp, dp, moe_tp, ep, named_tp or root):
        return _spread(root, root if dp > 1 else 1, root)
    n_gpus = tp * dp
    if ep == 1 and named_ep == n_gpus:
        ep = n_gpus
    if dp == 1:
        dp = _implied_ranks(record, n_gpus, ep)
    return Deployment(tp=max(n_gpus // dp, 1), dp=dp, moe_tp=max(n_gpus // ep, 1), ep=ep)


def _spread(n_gpus: int, dp: int, ep: int) -> Deployment:
    return Deployment(tp=n_gpus // dp, dp=dp, moe_tp=n_gpus // ep, ep=ep)


def _is_doubled(tp: int, dp: int, moe_tp: int, ep: int, named_tp: int) -> bool:
    """Whether degrees were multiplied twice, so that tp x dp is a square."""
    root = math.isqrt(tp * dp)
    if root < 2 or root * root != tp * dp or named_tp != root:
        return False
    by_tensor = dp == 1 and moe_tp == root and ep == root
    by_rank = dp == root and ep == tp * dp
    return by_tensor or by_rank or (dp == tp * dp and ep == root)


def _named(record: Record, name: str) -> int:
    """A degree that the row's id names, such as ``_tp4_`` or ``_ep4_0_``; 0 where it does not."""
    found = re.search(rf"_{name}(\d{{1,4}})(?=_|$)", record.get("id", ""))
    return int(found.group(1)) if found else 0


def _implied_ranks(record: Record, n_gpus: int, ep: int) -> int:
    """Attention ranks where a row gives a batch per rank; all GPUs where it gives only a batch."""
    batch = whole(record, "batch_size", 0)
    concurrency = whole(record, "concurrency", 0)
    if not concurrency:
        return n_gpus if ep == n_gpus else 1
    if not batch or concurrency <= batch or concurrency % batch:
        return 1
    ranks = min(concurrency // batch, n_gpus)
    return ranks if n_gpus % ranks == 0 else 1
