"""A worker of a mount that first does what a test has put into $CLIPFS_TEST_PATCH, which is Python.

``child.PROGRAM`` names it instead of the real one: a worker is a new program, so nothing else of a test reaches it.
"""

from __future__ import annotations

import os
import sys

from clipfs.mounting import worker

if __name__ == "__main__":
    exec(os.environ["CLIPFS_TEST_PATCH"])
    sys.exit(worker.main())
