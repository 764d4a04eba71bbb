"""`python -m tuneward_cli` is `tuneward`."""

import sys

from tuneward_cli.main import main

sys.exit(main())
