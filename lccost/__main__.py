"""Entry point: ``lccost`` and ``python -m lccost``."""

import gc
import os
import sys

from lccost.cli import cli

# The cost model multiplies no matrices; starting BLAS threads is a quarter of a prediction's time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Modules and bundled data stay: looking for garbage among them is a tenth of a short command.
gc.set_threshold(100_000, 20, 20)


def main() -> None:
    """Run the command line; the reader of a pipe that closes early is not an error."""
    try:
        cli(prog_name="lccost")
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    finally:
        # The process ends here: looking for garbage once more is an eighth of a short command.
        gc.freeze()


if __name__ == "__main__":
    main()
