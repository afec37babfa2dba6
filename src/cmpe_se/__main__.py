"""``python -m cmpe_se``, which ``accelerate launch -m cmpe_se train ...`` needs."""

import sys

from cmpe_se.cli import main

sys.exit(main())
