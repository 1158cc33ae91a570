"""QEMU's guest agent spoken to by a test, and a gate before the instant."""

import json
import queue
import socket
import threading

from .proxy import Proxy


class Agent:
    """A client of the agent's socket: the only one while it is open."""

    def __init__(self, path, timeout=60):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        sync = {"execute": "guest-sync-delimited", "arguments": {"id": 4711}}
        self._socket.sendall(b"\xff" + json.dumps(sync).encode() + b"\n")
        while not self._lines.readline().endswith(b"\xff" + b'{"return": 4711}\n'):
            pass  # Meant for an earlier client.

    def call(self, name):
        self._socket.sendall(json.dumps({"execute": name}).encode() + b"\n")
        return json.loads(self._lines.readline())["return"]

    def close(self):
        self._lines.close()
        self._socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Gate(Proxy):
    """Stands where the oracle does, and makes no copies: once `shut`, each transaction that begins
    a point in time waits for `open`, or is dropped with its client."""

    def __init__(self, *arguments):
        self.is_shut = False
        self.reached = threading.Event()
        self._verdicts = queue.Queue()
        super().__init__(*arguments)

    def shut(self):
        self.reached.clear()
        self.is_shut = True

    def open(self):
        self.is_shut = False
        self._verdicts.put(True)

    def drop(self):
        self.is_shut = False
        self._verdicts.put(False)

    def begin(self, actions):
        if self.is_shut and any(action["type"] == "blockdev-backup" for action in actions):
            self.reached.set()
            if not self._verdicts.get(timeout=60):
                raise OSError("the gate stays shut")
        return actions, None
