"""Imported before all else: ``python -m cmpe_se`` imports this package, and PyTorch with it, before any code of ours.

Ctrl-C in those seconds would print a trace from the middle of an import.
"""

import sys

if sys.argv[:1] == ["-m"] and "cmpe_se" in sys.orig_argv:  # runpy has found no module's path yet
    from cmpe_se_command import end_at_once_when_stopped

    end_at_once_when_stopped()
