"""`python -m mnist`: the `mnist` command if it is not on the PATH."""

import sys

from mnist.cli import main

sys.exit(main())
