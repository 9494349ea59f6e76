"""`python -m rlhf_core` is the command `rlhf`."""

import sys

from rlhf_core.cli import main

sys.exit(main())
