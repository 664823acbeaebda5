"""Stops single threads of a process, as a defect or a dying disk would: freeze.py PID THREAD-NAME-PREFIX.

Prints how many it holds; lets them go when its standard input closes or it is killed. (SIGSTOP would stop all of them.)
"""

import ctypes
import os
import select
import sys

ATTACH, WALL = 16, 0x40000000
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(request, thread):
    if libc.ptrace(request, thread, None, None) != 0:
        sys.exit(f"ptrace: {os.strerror(ctypes.get_errno())}")
    return thread


process, prefix = sys.argv[1:]
tasks = f"/proc/{process}/task"
threads = [int(t) for t in os.listdir(tasks) if open(f"{tasks}/{t}/comm").read().startswith(prefix)]
for thread in threads:
    os.waitpid(ptrace(ATTACH, thread), WALL)
print(len(threads), flush=True)
while not select.select([sys.stdin], [], [], 0.1)[0]:
    try:
        # A process whose end its tracer does not take notice of stays a zombie.
        os.waitpid(-1, WALL | os.WNOHANG)
    except ChildProcessError:
        break
