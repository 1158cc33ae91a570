"""What the tests of the plugin against a real QEMU share.

The plugin is `$QEMU_FLEECE`, else target/debug/qemu-fleece of this checkout.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

from .guest import RIG, ROOT
from .machines import DAEMON, QEMU, Daemon, Relay, Vm, blockdev, io, make_image, virtio  # noqa: F401
from .proxy import Proxy
from .qmp import Qmp

sys.path.insert(0, str(ROOT / "integrations/python"))
from fleece_host.plugin import Plugin, PluginError  # noqa: E402
from fleece_host.stream import Checker, StreamFailed, read_stream, write_record  # noqa: E402

PLUGIN = os.environ.get("QEMU_FLEECE", str(ROOT / "target/debug/qemu-fleece"))
QEMU_7_2 = str(RIG / "qemu-7.2/qemu-system-x86_64")
# What Debian has for a release of its: 10.1 at least.
QEMU_NEW = str(RIG / "qemu-new/qemu-system-x86_64")
DAEMON_7_2 = str(RIG / "qemu-7.2/qemu-storage-daemon")
PREFIX = "qf-"
SECONDS = 60
# Seconds between two messages for a host that reads slowly: what it says in the middle of a
# stream is acted on there, and not behind its end.
SLOWLY = 0.02


class Test(unittest.TestCase):
    """Each test has a time limit: `limit` seconds."""

    limit = 2 * SECONDS

    def run(self, result=None):
        def late(*_):
            raise TimeoutError(f"the test took longer than {self.limit} s")

        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(self.limit)
        try:
            return super().run(result)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)

    def refused(self, code, plugin, method, params):
        """The error's data; it must be of this code."""
        with self.assertRaises(PluginError) as caught:
            plugin.call(method, params, SECONDS)
        self.assertEqual(code, caught.exception.code, caught.exception)
        return caught.exception.data

    def assert_equal_files(self, one, other, what):
        self.assertEqual(os.path.getsize(one), os.path.getsize(other), what)
        with open(one, "rb") as first, open(other, "rb") as second:
            offset = 0
            while block := first.read(1 << 20):
                against = second.read(1 << 20)
                if block != against:
                    offset += next(n for n in range(len(block)) if block[n] != against[n])
                    self.fail(f"{what}: differs at offset {offset}")
                offset += len(block)


class Places:
    """A folder for a test's files, with the plugin's scratch and runtime folders in it."""

    def __init__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="fleece-test-"))
        self.scratch = self.folder / "scratch"
        self.runtime = self.folder / "run"
        self.scratch.mkdir()
        self.runtime.mkdir()

    def command(self, *more):
        return [PLUGIN, "--scratch-dir", str(self.scratch), "--runtime-dir", str(self.runtime), *more]

    def plugin(self, carrier="framed", on_notice=None, more=()):
        if not os.access(PLUGIN, os.X_OK):
            raise AssertionError(f"there is no plugin {PLUGIN}: build it, or set QEMU_FLEECE")
        return Plugin(self.command(*more), carrier, on_notice)

    def files(self):
        """Files that the plugin has left."""
        return sorted(os.listdir(self.scratch) + os.listdir(self.runtime))

    def close(self):
        shutil.rmtree(self.folder)


def ours(qmp):
    """What of a session's objects is in QEMU, by kind and name."""
    nodes = qmp.command("query-named-block-nodes")
    names = [f"node {node['node-name']}" for node in nodes]
    names += [
        f"bitmap {bitmap.get('name')}" for node in nodes for bitmap in node.get("dirty-bitmaps", [])
    ]
    names += [f"job {job['id']}" for job in qmp.command("query-jobs")]
    names += [f"export {export['id']}" for export in qmp.command("query-block-exports")]
    # A storage daemon has no place for objects as long as there are none.
    if "objects" in {each["name"] for each in qmp.command("qom-list", {"path": "/"})}:
        names += [f"object {each['name']}" for each in qmp.command("qom-list", {"path": "/objects"})]
    commands = {entry["name"] for entry in qmp.command("query-commands")}
    if "query-fdsets" in commands:
        names += [f"fdset {one.get('opaque')}" for fdset in qmp.command("query-fdsets") for one in fdset["fds"]]
    return sorted(name for name in set(names) if name.split(" ")[1].startswith(PREFIX))


class Rig(Places):
    """A machine behind the oracle's proxy: its `monitor` is for the plugin, `qmp` for the test.

    `machine` has three monitors in `qmp` and can be closed: Guest, Vm or Daemon. `proxy` is
    what stands between.
    """

    def __init__(self, machine, images=None, proxy=Proxy):
        super().__init__()
        self.machine = machine
        self.images = images or self.folder
        self.monitor = f"unix:{self.folder}/qmp"
        self.copies = self.folder / "oracle"
        self.proxy = self.qmp = None
        try:
            self.proxy = proxy(str(self.folder / "qmp"), *machine.qmp[:2], self.copies)
            # Whose guest does not run need not wait less. While a copy lasts, what is above the disk
            # is not ours; and QEMU 7.2 may run a write by `io` while it drains the disk at a copy's
            # end: the write would wait for the drain, and the drain's end for the write.
            self.proxy.copies_first = isinstance(machine, Vm)
            self.qmp = Qmp(machine.qmp[2])
        except BaseException:
            self.close()
            raise

    def oracle(self, number=None):
        """The images of a point in time, by node, complete: of the last, or of number 1, 2, ..."""
        number = number or max(int(entry.name) for entry in self.copies.iterdir())
        result = self.proxy.wait(number, SECONDS)
        if result is None or result["errors"]:
            raise AssertionError(f"the oracle's copy failed: {result}")
        return result["images"]

    def forget(self):
        """The oracle's images have been used."""
        for folder in self.copies.iterdir():
            for image in folder.glob("*.raw"):
                image.unlink()

    def image(self, disk):
        """Where streams of a disk are applied, one after the other."""
        return self.images / f"{disk}.image"

    def compare(self, test, backup, nodes):
        """Holds the images of a backup's disks, of these nodes, against the oracle's."""
        copies = self.oracle()
        for disk in backup.streams:
            test.assert_equal_files(self.image(disk), copies[nodes[disk]], disk)
        self.forget()

    def scratch_bytes(self):
        """What the scratch files take, which QEMU has open and nobody else sees."""
        folder, found = f"/proc/{self.machine.process.pid}/fd", {}
        for name in os.listdir(folder):
            try:
                if os.readlink(f"{folder}/{name}").startswith(str(self.scratch)):
                    file = os.stat(f"{folder}/{name}")
                    found[file.st_ino] = file.st_blocks * 512
            except FileNotFoundError:
                pass  # QEMU has closed it meanwhile: one of another's.
        if not found:
            raise AssertionError("QEMU has no scratch open")
        return sum(found.values())

    def checkpoints(self, plugin):
        """The names of each disk's checkpoints."""
        return {disk: list(found) for disk, found in self.health(plugin).items()}

    def health(self, plugin, **params):
        """The health of each disk's checkpoints, by their names; not of what is missing or foreign."""
        result = plugin.call("checkpoint.list", {"monitor": self.monitor, **params}, SECONDS)
        return {
            disk["disk"]: {
                each["checkpoint"]: each["health"]
                for each in disk["checkpoints"]
                if each["health"] not in ("missing", "foreign")
            }
            for disk in result["disks"]
        }

    def close(self):
        self.machine.close()
        if self.qmp:
            self.qmp.close()
        if self.proxy:
            self.proxy.close()
        super().close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Wire:
    """The plugin's process and its lines one by one, for hosts that behave oddly."""

    def __init__(self, command, carrier="framed", pass_fds=()):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=pass_fds
        )
        self.pace = 0  # Seconds before each message is read.
        self._ids = 0
        hello = {"protocols": [1], "carrier": carrier, "host": {"name": "test", "version": "0"}}
        self.call("hello", hello)

    def send(self, method, params):
        """Sends a request: its id."""
        self._ids += 1
        message = {"jsonrpc": "2.0", "id": self._ids, "method": method, "params": params}
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()
        return self._ids

    def receive(self):
        """The next message and its payload; None at the end."""
        time.sleep(self.pace)
        line = self.process.stdout.readline()
        if not line:
            return None
        message = json.loads(line)
        return message, self.process.stdout.read(message.get("payload_bytes", 0))

    def reply(self, id):
        """The reply to a request; what comes before it is passed over."""
        while (received := self.receive()) is not None:
            if received[0].get("id") == id:
                return received[0]
        raise AssertionError("the plugin ended")

    def call(self, method, params):
        reply = self.reply(self.send(method, params))
        if "error" in reply:
            raise AssertionError(f"{method}: {reply['error']}")
        return reply["result"]

    def wait(self):
        """Its exit status, however it ends."""
        return self.process.wait(SECONDS)

    def close(self):
        for file in (self.process.stdin, self.process.stdout):
            try:
                file.close()
            except OSError:
                pass  # What was not sent has no reader.
        try:
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
            self.process.wait()


class Stream:
    """Takes a stream's records: checks them, applies them to an image, keeps them if asked."""

    def __init__(self, image, keep=None):
        self.checker = Checker()
        self.records = []
        self.failed = None
        self._keep = open(keep, "wb") if keep else None
        mode = "r+b" if os.path.exists(image) else "w+b"
        self._image = open(image, mode)

    def take(self, record, payload):
        self.records.append(record)
        try:
            self.checker.take(record, payload)
        except StreamFailed as failed:
            self.failed = failed
            return
        if self._keep:
            write_record(self._keep, record, payload)
        if record["kind"] == "begin":
            self._image.truncate(record["size"])
        elif record["kind"] in ("data", "zero"):
            self._image.seek(record["offset"])
            self._image.write(payload or bytes(record["length"]))

    def finish(self):
        self.close()
        self.checker.finish()

    def close(self):
        self._image.close()
        if self._keep:
            self._keep.close()

    @property
    def begin(self):
        return self.checker.begin

    @property
    def end(self):
        return self.checker.end

    def kinds(self, start, end):
        """The kinds of the records in a range."""
        return {
            record["kind"]
            for record in self.records
            if "length" in record and record["offset"] < end and record["offset"] + record["length"] > start
        }


class Backup:
    """A backup that is open, then its streams by disk."""

    def __init__(self, plugin, monitor, **params):
        self._open(plugin, plugin.call("backup.begin", {"monitor": monitor, **params}, SECONDS))

    @classmethod
    def of(cls, plugin, reply):
        """The backup of a reply that came otherwise."""
        backup = cls.__new__(cls)
        backup._open(plugin, reply)
        return backup

    def _open(self, plugin, reply):
        self.plugin = plugin
        self.reply = reply
        self.id = self.reply["backup"]
        self.disks = {disk["disk"]: disk for disk in self.reply["disks"]}
        self.streams = {}

    def start(self, disk, image, keep=None, on_record=None, **params):
        """Starts to read a disk: the future of its reply."""
        stream = self.streams[disk] = Stream(image, keep)

        def take(record, payload):
            stream.take(record, payload)
            if on_record:
                on_record(record)

        params = {"backup": self.id, "disk": disk, **params}
        return self.plugin.start("backup.read", params, on_record=take)

    def read(self, disk, image, **params):
        reply = self.start(disk, image, **params).result(SECONDS)
        self.streams[disk].finish()
        return reply

    def read_all(self, rig):
        """All disks, side by side."""
        replies = {disk: self.start(disk, rig.image(disk)) for disk in self.disks}
        for disk, future in replies.items():
            reply = future.result(SECONDS)
            self.streams[disk].finish()
            if reply["digest"] != self.streams[disk].end["digest"]:
                raise AssertionError("the reply's digest is not the stream's")

    def call(self, method, **params):
        return self.plugin.call(f"backup.{method}", {"backup": self.id, **params}, SECONDS)

    def commit(self, **params):
        return self.call("commit", **params)

    def abort(self):
        return self.call("abort")
