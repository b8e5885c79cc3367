# SPDX-License-Identifier: Apache-2.0
"""Entry point of `python -m agent.python` and of the component."""

from .main import main

main()
