"""``python -m clipfs`` is the command ``clipfs``."""

import sys

from clipfs.cli.main import main

sys.exit(main())
