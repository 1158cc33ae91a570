"""A small QMP client, for the rig only: one command at a time, events in a queue."""

import itertools
import json
import queue
import socket
import threading


class QmpError(Exception):
    """QEMU refused a command, or the monitor is gone."""


class Qmp:
    """One connection to a monitor. `events` gets each event, and None when QEMU is gone."""

    def __init__(self, path, timeout=60):
        self.timeout = timeout
        self.events = queue.Queue()
        self._replies = queue.Queue()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX)
        # A monitor that somebody else uses accepts, but does not greet.
        self._socket.settimeout(timeout)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self._socket.settimeout(None)
        threading.Thread(target=self._read, daemon=True).start()
        self.command("qmp_capabilities")

    def command(self, name, arguments=None, fd=None):
        """What QEMU returns; `fd` goes along with the command."""
        with self._lock:
            message = {"execute": name, "id": next(self._ids)}
            if arguments is not None:
                message["arguments"] = arguments
            data = json.dumps(message).encode() + b"\n"
            sent = socket.send_fds(self._socket, [data], [] if fd is None else [fd])
            self._socket.sendall(data[sent:])
            try:
                reply = self._replies.get(timeout=self.timeout)
            except queue.Empty:
                raise QmpError(f"{name}: no reply in {self.timeout} s") from None
        if reply is None:
            self._replies.put(None)
            raise QmpError(f"{name}: the monitor is gone")
        if "error" in reply:
            raise QmpError(f"{name}: {reply['error']['desc']}")
        return reply["return"]

    def wait_event(self, name, **data):
        """Skips to the next event of that name with that data."""
        while True:
            event = self.events.get(timeout=self.timeout)
            if event is None:
                raise QmpError(f"the monitor is gone, waiting for {name}")
            if event["event"] == name and data.items() <= event.get("data", {}).items():
                return event

    def close(self):
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # QEMU was first.
        self._socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _read(self):
        try:
            for line in self._lines:
                message = json.loads(line)
                if "QMP" in message:
                    continue  # A QEMU that is just starting may greet twice.
                (self.events if "event" in message else self._replies).put(message)
        except (OSError, ValueError):
            pass  # Closed, perhaps in the middle of a line.
        self._lines.close()
        self.events.put(None)
        self._replies.put(None)
