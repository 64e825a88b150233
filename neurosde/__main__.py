"""`python -m neurosde`."""

import sys

from neurosde.cli import main

sys.exit(main())
