"""A command that is stopped in the middle of its imports, several times in one start.

Python imports this module as it starts, where its folder is in PYTHONPATH. At the beginning of each import that
``STOP_DURING`` names, the process forks for each signal of ``STOP_SIGNALS``: the child has the handlers and the
half-imported packages of that moment, gets the signal, and its status and its stderr are a line of the file
``STOP_REPORT``. After the last of the imports the process itself ends. Nothing but what Python has imported for
itself is imported before: a handler that needs more must not find it here.
"""

import _signal
import os
import sys


class _Stop:
    """Finds no module; it is asked for each one before the others."""

    def __init__(self, modules: list[str], signals: list[str], report: str):
        self.modules, self.signals, self.report = modules, signals, report

    def find_spec(self, name: str, *_: object) -> None:
        if name in self.modules:
            self.modules.remove(name)
            for number in self.signals:
                self._stopped(name, number)
            if not self.modules:
                os._exit(0)

    def _stopped(self, module: str, number: str) -> None:
        end, begin = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(begin, 2)
            os.close(end)
            os.close(begin)
            os.kill(os.getpid(), getattr(_signal, number))
            for _ in range(10**6):  # a handler runs between two steps of Python
                pass
            os._exit(99)  # it has not ended
        os.close(begin)
        said = b""
        while part := os.read(end, 4096):
            said += part
        os.close(end)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(self.report, "a") as report:
            report.write(f"{module} {number} {status} {said!r}\n")


if "STOP_REPORT" in os.environ:
    _signal.signal(_signal.SIGHUP, _signal.SIG_DFL)  # which a test runner under nohup hands down as ignored
    _moments, _signals = os.environ["STOP_DURING"].split(), os.environ["STOP_SIGNALS"].split()
    sys.meta_path.insert(0, _Stop(_moments, _signals, os.environ["STOP_REPORT"]))
