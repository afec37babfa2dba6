"""``python -m cmpe_se`` that others start, a launcher or a comparison: forked from a process that has imported it.

A start takes five to seven seconds of imports, and a run of two processes has three. Here the launcher itself is forked
from the tests' fork server (:mod:`tests.training.processes`), and first forks a second server for what it will start.
What it starts is its child, in the session, with the environment and the files that it asked for; only the imports
are not done again. Some tests start everything from nothing, as users do.
"""

import ctypes
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

RANKS = "CMPE_SE_TEST_RANKS"
"""Environment variable with a folder, in which each process of a run writes its id into a file named by its rank."""
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl.h
_START = subprocess.Popen._execute_child
_ARGUMENTS = list(inspect.signature(_START).parameters)


def warm_starts() -> None:
    """Let this process, which has no thread yet, start ``python -m cmpe_se`` as a fork of what it is now."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)  # it gets the children of its children that end
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        _serve(theirs)
    theirs.close()
    one_at_a_time = threading.Lock()

    def start(process, *values) -> None:
        asked = dict(zip(_ARGUMENTS, (process, *values), strict=False))
        command = [os.fspath(part) for part in asked["args"]] if not isinstance(asked["args"], str) else []
        module = command.index("cmpe_se") if "cmpe_se" in command else 0
        if module == 0 or command[0] != sys.executable or command[module - 1] != "-m":
            _START(process, *values)
            return
        settings = {
            "arguments": command[module + 1 :],
            "cwd": os.fspath(asked["cwd"] or os.getcwd()),
            "env": dict(os.environ if asked["env"] is None else asked["env"]),
            "session": asked["start_new_session"],
        }
        given = (asked["p2cread"], asked["c2pwrite"], asked["errwrite"])
        files = [own if own >= 0 else number for number, own in enumerate(given)]
        with one_at_a_time:
            socket.send_fds(ours, [json.dumps(settings).encode()], files)
            process.pid = int(ours.recv(32))
        process._child_created = True
        process._close_pipe_fds(*(asked[name] for name in _ARGUMENTS if name[:3] in ("p2c", "c2p", "err")))

    subprocess.Popen._execute_child = start


def _serve(requests: socket.socket) -> None:
    """Answer each request with the id of its process; end with the process that asks."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        content, files, *_ = socket.recv_fds(requests, 2**20, 3)
        if not content:
            os._exit(0)
        end, begin = os.pipe()
        between = os.fork()
        if between == 0:  # ends at once, so that its child is that of the process that asked
            child = os.fork()
            if child == 0:
                for file in (end, begin):
                    os.close(file)
                requests.close()
                _become(files, **json.loads(content))
            os.write(begin, str(child).encode())
            os._exit(0)
        os.waitpid(between, 0)
        requests.send(os.read(end, 32))
        for file in (end, begin, *files):
            os.close(file)


def _become(files: list[int], arguments: list[str], cwd: str, env: dict[str, str], session: bool) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if session:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if folder := env.get(RANKS):
        Path(folder, env["RANK"]).write_text(str(os.getpid()))
    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    sys.argv = ["cmpe_se", *arguments]
    runpy.run_module("cmpe_se", run_name="__main__", alter_sys=True)
