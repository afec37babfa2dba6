"""``python -m cmpe_se``, which ``torchrun -m cmpe_se train`` and ``accelerate launch -m cmpe_se train`` need."""

import sys

from cmpe_se_command import main

sys.exit(main())
