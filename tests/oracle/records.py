"""A push to the plugin, whose records a host reads when it likes."""

import os
import pathlib
import shutil
import socket
import subprocess
import threading

from . import support
from .qmp import Qmp
from .support import Checker, Places, Vm, Wire, io
from .targets import until

DEVICE = "/machine/peripheral/dev-a/virtio-backend"


class Host:
    """It has one backup of one disk, and one stream at a time."""

    def __init__(self, places, monitor, disk="dev-a", **begin):
        self.wire = Wire(places.command())
        self.places, self.disk, self.checker = places, disk, Checker()
        begin = {"monitor": monitor, "checkpoint": "new", **begin}
        self.backup = self.wire.call("backup.begin", begin)["backup"]
        self.failed = self.request = None
        self.replies = {}

    def push(self, **params):
        self.stream("backup.push", target={"kind": "records"}, **params)

    def stream(self, method, **params):
        """Starts a stream, whose image is a new one."""
        if self.request:
            self.image.close()
        self.checker, self.failed = Checker(), None
        self.wire.pace = 0
        self.image = open(self.places.folder / "streamed.raw", "wb")
        self.request = self.send(method, {"backup": self.backup, "disk": self.disk, **params})

    def send(self, method, params):
        return self.wire.send(method, params)

    def cancel(self):
        self.wire.pace = support.SLOWLY
        return self.send("cancel", {"id": self.request})

    def take(self):
        """Reads one message: a record goes to the image, a reply to `replies`."""
        received = self.wire.receive()
        if received is None:
            raise AssertionError("the plugin has ended")
        message, payload = received
        if "id" in message:
            self.replies[message["id"]] = message
        elif message["method"] == "record":
            self.record(message["params"]["record"], payload)

    def record(self, record, payload):
        if record["kind"] == "failed":
            self.failed = record
            return
        self.checker.take(record, payload or None)
        if record["kind"] == "begin":
            # What no data comes for stays a hole.
            self.image.truncate(record["size"])
        elif record["kind"] == "data":
            self.image.seek(record["offset"])
            self.image.write(payload)

    def read_some(self, offset=1):
        """Reads until so much of the disk is there."""
        while self.checker.offset < offset and self.request not in self.replies:
            self.take()

    def reply(self, request=None):
        """Reads until a request is answered, by default the push."""
        request = request or self.request
        while request not in self.replies:
            self.take()
        self.image.flush()
        return self.replies[request]

    def error(self, request=None):
        """The data of the error that answers a request."""
        return self.reply(request)["error"]["data"]

    def call(self, method, **params):
        """The reply to a request about the backup."""
        return self.reply(self.send(f"backup.{method}", {"backup": self.backup, **params}))

    def memory(self):
        """Bytes of memory that the plugin has, and no swap."""
        lines = pathlib.Path(f"/proc/{self.wire.process.pid}/status").read_text().splitlines()
        found = dict(line.split(":", 1) for line in lines)
        return sum(int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmSwap"))

    def close(self):
        if self.request:
            self.image.close()
        self.wire.close()


class Recorded(support.Test):
    """A VM with one sparse disk, node `a`, and a host that pushes it to itself."""

    limit = 120
    qemu = support.QEMU

    def setUp(self):
        self.places = Places()
        self.addCleanup(self.places.close)
        self.image = self.places.folder / "a.qcow2"
        self.oracle = self.places.folder / "oracle.qcow2"

    def run_vm(self, arguments):
        self.machine = Vm(arguments, self.qemu)
        self.addCleanup(self.machine.close)
        self.qmp = Qmp(self.machine.qmp[2])
        self.addCleanup(self.qmp.close)

    def boot(self, size, *writes):
        """The disk, of this size, has these writes; its oracle is a copy of the image."""
        support.make_image(self.image, "qcow2", size)
        self.run_vm(support.virtio("a", self.image))
        self.write(*writes, "flush")
        shutil.copy(self.image, self.oracle)

    def write(self, *commands):
        for command in commands:
            io(self.qmp, DEVICE, command)

    def host(self, monitor=None, **params):
        host = Host(self.places, monitor or f"unix:{self.machine.qmp[0]}", **params)
        self.addCleanup(host.close)
        return host

    def job(self):
        """What QEMU says of the push's job; None: there is none."""
        jobs = self.qmp.command("query-block-jobs")
        return next((job for job in jobs if job["device"].endswith("-push")), None)

    def is_paused(self, **more):
        job = self.job()
        return job and job["status"] == "paused" and more.items() <= job.items()

    def wait_paused(self, **more):
        """Until QEMU has stopped the job."""
        # A look later it may run again: what was on its way to the host made room.
        until(lambda: self.is_paused(**more) or self.fail_if_over())

    def fail_if_over(self):
        self.assertFalse(self.is_over(), "the push ended")

    def is_over(self):
        return self.job() is None

    def freeze(self, monitor, host):
        """Freezes the monitor while the job runs; the host reads as much as that takes."""
        monitor.freeze()
        while self.will_pause():
            monitor.thaw()
            host.take()
            monitor.freeze()

    def will_pause(self):
        """Whether the job is paused, or is about to be: what was sent before may come behind the question."""
        self.job()
        return self.job()["paused"]

    def answers(self):
        """QEMU waits for all I/O at once."""
        actions = [{"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "theirs"}}]
        timeout, self.qmp.timeout = self.qmp.timeout, 5
        for command in ("stop", "cont", "stop"):
            self.qmp.command(command)
        self.qmp.command("transaction", {"actions": actions})
        self.qmp.command("block-dirty-bitmap-remove", {"node": "a", "name": "theirs"})
        self.qmp.timeout = timeout

    def right(self, host):
        """The stream has come to its end, and each byte is right."""
        reply = host.reply()
        self.assertIn("result", reply, reply)
        host.checker.finish()
        self.assertEqual(host.checker.end["digest"], reply["result"]["digest"])
        compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(self.oracle), host.image.name]
        compared = subprocess.run(compare, capture_output=True, text=True)
        self.assertEqual(0, compared.returncode, compared.stdout + compared.stderr)
        os.unlink(host.image.name)

    def incomplete(self, host):
        """What has not come to its end cannot be committed."""
        data = host.call("commit")["error"]["data"]
        self.assertEqual(("incomplete", "backup_open"), (data["code"], data["state_left"]))

    def aborted(self, host):
        """After an abort nothing is left."""
        self.assertEqual({"leftovers": []}, host.call("abort")["result"])
        self.nothing_is_left()

    def left(self):
        """What of a session's objects is in QEMU; 7.2 lets go of descriptors only while its processor runs."""
        return [each for each in support.ours(self.qmp) if not each.startswith("fdset")]

    def nothing_is_left(self):
        self.assertEqual([], self.left())
        self.assertEqual([], self.places.files())


class Freezer:
    """A monitor over TCP at `address`, that can be frozen: then QEMU hears nothing of its client."""

    def __init__(self, path):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._path, self._flows = path, threading.Event()
        self._flows.set()
        self._passes = threading.Lock()  # held while something is on its way
        threading.Thread(target=self._serve, daemon=True).start()

    def freeze(self):
        """What has passed before is with QEMU."""
        with self._passes:
            self._flows.clear()

    def thaw(self):
        self._flows.set()

    def cut(self):
        """The connection ends."""
        self._client.shutdown(socket.SHUT_RDWR)

    def _serve(self):
        try:
            self._client, _ = self._listener.accept()
        except OSError:
            return
        with self._client, socket.socket(socket.AF_UNIX) as server:
            server.connect(self._path)
            back = threading.Thread(target=self._pump, args=(server, self._client))
            back.start()
            self._pump(self._client, server, self._pass)
            back.join()

    def _pass(self, data, sink):
        while True:
            self._flows.wait()
            with self._passes:
                if self._flows.is_set():
                    return sink.sendall(data)

    @staticmethod
    def _pump(source, sink, carry=lambda data, sink: sink.sendall(data)):
        try:
            while data := source.recv(65536):
                carry(data, sink)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # It was cut, or the other direction has seen the end.

    def close(self):
        self.thaw()
        # Where nobody came.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
