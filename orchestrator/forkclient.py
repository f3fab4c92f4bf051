"""What Ray starts in the place of Python for a worker process: asks the fork server for the process, or becomes it.

Invariant: exactly one process comes of one call. Until the request is sent this one may still go on by itself, as plain
Python; afterwards the server's answer alone decides. A server that dies in between has this one fail, and Ray starts
another when no worker has registered in time.

Run as a script without site (`python -I -S forkclient.py SOCKET PYTHON SCRIPT ARGUMENTS...`), so it imports next to
nothing and nothing of this project.
"""

import array
import json
import os
import signal
import socket
import sys

PATIENCE_S = 30.0  # for a server that still imports; half of what Ray waits for a worker to register


def main(path: str, command: list[str]) -> int:
    """0: the server has forked the process. Does not return where this one becomes `command` itself."""
    answer = ask(path, command)
    if answer == "n":
        os.execv(command[0], command)
    if answer != "f":
        print("the fork server died over a request", file=sys.stderr)
    return int(answer != "f")


def ask(path: str, command: list[str]) -> str:
    """ "f": forked. "n": nothing was or will be. Empty: the server died over the request."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE_S)
        try:
            connection.connect(path)
            if connection.recv(1) != b"r":
                return "n"
        except OSError:  # it has ended, or imports for too long
            return "n"
        connection.settimeout(None)
        with open("/proc/self/oom_score_adj") as file:
            oom_score_adj = int(file.read())  # Ray has its workers killed first
        request = {
            "argv": command[1:],
            "cwd": os.getcwd(),
            "env": dict(os.environ),
            "oom_score_adj": oom_score_adj,
            "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],  # SIGINT, by Ray
        }
        data = json.dumps(request).encode()
        files = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
        try:
            connection.sendmsg([len(data).to_bytes(8, "big")], [files])
            connection.sendall(data)
            return connection.recv(1).decode()
        except OSError as error:
            print(f"the fork server: {error}", file=sys.stderr)
            return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
