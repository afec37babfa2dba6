"""Imported before all else: ``python -m cmpe_se`` imports this package, and PyTorch with it, before any code of ours.

Ctrl-C in those seconds, or an import that finds no place for its files, would print a trace from the middle of PyTorch.
"""

import sys

if sys.argv[:1] == ["-m"] and "cmpe_se" in sys.orig_argv:  # runpy has found no module's path yet
    from cmpe_se_command import end_at_once_when_stopped, temporary_files_fail

    end_at_once_when_stopped()
    if temporary_files_fail():
        sys.exit(1)
