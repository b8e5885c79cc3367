"""Entry point `python -m testbed.cli`, for other hosts, where the script is not installed."""

import sys

from testbed.cli import main

sys.exit(main())
