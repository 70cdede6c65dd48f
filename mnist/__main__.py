"""`python -m mnist`: the `mnist` command where it is not on the path."""

import sys

from mnist.cli import main

sys.exit(main())
