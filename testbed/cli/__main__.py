"""`python -m testbed.cli`, where the script `testbed` is not installed: on other hosts."""

import sys

from testbed.cli import main

sys.exit(main())
