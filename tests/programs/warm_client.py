"""What tests.warm's `python` runs: gives its words, environment and files to the tests, waits for the exit code.

    python -I -S tests/programs/warm_client.py SOCKET [python's words]
"""

import json
import os
import socket
import sys

words = [word for word in sys.argv[2:] if word != "-u"]
if words[:1] != ["-m"]:
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    socket.send_fds(server, [b"."], [0, 1, 2])
    request = {"words": words[1:], "env": dict(os.environ), "cwd": os.getcwd()}
    server.sendall(json.dumps(request).encode() + b"\n")
    code = int(server.makefile().readline())
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
