"""The end of an exported disk's lease, what comes in its way, and clients by descriptor."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time

from . import support
from .exports import SOON, ZERO, Machine, program
from .guest import MIB, ROOT
from .nbd import READ, Nbd, copy
from .support import Wire


class Lease(Machine):
    """However it ends: the address is gone, and clients are cut off, also those that do not read."""

    def lease(self, wire):
        """An exported disk with two clients, of which one never reads its answers."""
        self.addCleanup(wire.close)
        params = {"monitor": self.rig.monitor, "checkpoint": "one"}
        self.backup = wire.call("backup.begin", params)["backup"]
        self.follow(wire.call("backup.export", {"backup": self.backup, "disk": "dev-a"}))

    def follow(self, export):
        self.path = export["address"].removeprefix("unix:")
        self.clients = [Nbd(export["address"], export["export"]) for _ in range(2)]
        for client in self.clients:
            self.addCleanup(client.close)
        idle, stuck = self.clients
        self.assertEqual(b"\1" * 512, idle.read(0, 512))
        for _ in range(8):
            stuck.send(READ, 0, 8 * MIB)
        stuck.socket.recv(1)  # The first answer is on its way, and cannot end.

    def over(self, checkpoint):
        for client in self.clients:
            client.ends()
        self.assertFalse(os.path.exists(self.path))
        self.assertEqual([], support.ours(self.rig.qmp))
        found = self.rig.qmp.command("query-block-exports")
        self.assertEqual([], found)
        self.rig.qmp.command("nbd-server-start", {"addr": {"type": "unix", "data": {"path": self.path_of_theirs()}}})
        self.rig.qmp.command("nbd-server-stop")
        with self.rig.plugin() as plugin:
            names = self.rig.checkpoints(plugin)["dev-a"]
        self.assertEqual(["one"] if checkpoint else [], names)
        self.assertEqual([], self.rig.files())

    def path_of_theirs(self):
        """Where another NBD server would listen."""
        return str(self.places.folder / "theirs")

    def test_commit(self):
        wire = Wire(self.rig.command())
        self.lease(wire)
        began = time.monotonic()
        reply = wire.call("backup.commit", {"backup": self.backup, "disks": ["dev-a"]})
        self.assertEqual({"committed": ["dev-a"], "deleted": [], "leftovers": []}, reply)
        self.assertLess(time.monotonic() - began, SOON)
        wire.close()
        self.over(True)

    def test_abort(self):
        wire = Wire(self.rig.command())
        self.lease(wire)
        began = time.monotonic()
        self.assertEqual({"leftovers": []}, wire.call("backup.abort", {"backup": self.backup}))
        self.assertLess(time.monotonic() - began, SOON)
        wire.close()
        self.over(False)

    def test_shutdown(self):
        wire = Wire(self.rig.command())
        self.lease(wire)
        began = time.monotonic()
        self.assertEqual({"aborted": [self.backup], "leftovers": []}, wire.call("shutdown", {}))
        self.assertEqual(0, wire.wait())
        self.assertLess(time.monotonic() - began, SOON)
        self.over(False)

    def test_standard_input_ends(self):
        wire = Wire(self.rig.command())
        self.lease(wire)
        began = time.monotonic()
        wire.process.stdin.close()
        self.assertEqual(3, wire.wait())
        self.assertLess(time.monotonic() - began, SOON)
        self.over(False)

    def test_the_host_is_killed(self):
        params = {"monitor": self.rig.monitor, "checkpoint": "one", "disks": [{"disk": "dev-a"}]}
        host = subprocess.Popen(
            [sys.executable, "-m", "oracle.host_to_kill", json.dumps(self.rig.command()), json.dumps(params), "export"],
            cwd=ROOT / "tests",
            stdout=subprocess.PIPE,
        )
        with host:
            self.addCleanup(host.kill)
            plugin = os.pidfd_open(int(host.stdout.readline()))
            self.follow(json.loads(host.stdout.readline()))
            host.kill()
        with os.fdopen(plugin):
            self.assertTrue(select.select([plugin], [], [], SOON)[0], "the plugin outlives its host")
        self.over(False)

    def test_a_signal(self):
        wire = Wire(self.rig.command())
        self.lease(wire)
        wire.process.send_signal(signal.SIGTERM)
        self.assertEqual(3, wire.wait())
        self.over(False)


class Races(Machine):
    """Requests that overlap: nothing stays, whichever was first."""

    def setUp(self):
        super().setUp()
        self.wire = Wire(self.rig.command())
        self.addCleanup(self.wire.close)

    def begin(self):
        self.backup = self.wire.call("backup.begin", {"monitor": self.rig.monitor})["backup"]
        self.params = {"backup": self.backup, "disk": "dev-a"}

    def test_two_exports(self):
        for _ in range(3):
            self.begin()
            first, second = (self.wire.send("backup.export", self.params) for _ in range(2))
            found = {}
            while len(found) < 2:
                message, _ = self.wire.receive()
                found[message["id"]] = message.get("result")
            self.assertTrue(found[first])
            self.assertEqual(found[first], found[second])
            self.wire.call("backup.abort", {"backup": self.backup})
            self.nothing_is_left()

    def test_cancel(self):
        for _ in range(5):
            self.begin()
            export = self.wire.send("backup.export", self.params)
            self.wire.send("cancel", {"id": export})
            reply = self.wire.reply(export)
            if "error" in reply:  # Else it was done before.
                self.assertEqual("cancelled", reply["error"]["data"]["code"])
            result = self.wire.call("backup.export", self.params)
            with Nbd(result["address"], result["export"]) as client:
                self.assertEqual(b"\1" * 512, client.read(0, 512))
            self.wire.call("backup.abort", {"backup": self.backup})
            self.nothing_is_left()

    def test_abort(self):
        for _ in range(5):
            self.begin()
            self.wire.send("backup.export", self.params)
            self.assertEqual({"leftovers": []}, self.wire.call("backup.abort", {"backup": self.backup}))
            self.nothing_is_left()

    def test_standard_input_ends(self):
        self.begin()
        self.wire.send("backup.export", self.params)
        self.wire.process.stdin.close()
        self.assertEqual(3, self.wire.wait())
        self.nothing_is_left()


class Sockets(Machine):
    """`socket`: the export comes over a descriptor that the plugin was started with."""

    def export(self, ours, theirs, disk="dev-a", checkpoint=None):
        wire = Wire(self.rig.command(), pass_fds=[theirs.fileno()])
        self.addCleanup(wire.close)
        params = {"monitor": self.rig.monitor, "checkpoint": checkpoint}
        backup = wire.call("backup.begin", params)["backup"]
        self.write("write -P 2 0 16M")
        params = {"backup": backup, "disk": disk, "socket": f"fd:{theirs.fileno()}"}
        export = wire.call("backup.export", params)
        theirs.close()
        client = Nbd(ours, export["export"], export["allocation_context"])
        self.addCleanup(client.close)
        return wire, backup, export, client

    def whole(self, client, node):
        zeros = sum(length for _, length, flags in client.status() if flags & ZERO)
        self.assertGreaterEqual(zeros, 8 * MIB)
        copy(client, [(0, client.size)], self.rig.image(node))
        self.assert_equal_files(self.rig.image(node), self.rig.oracle()[node], node)

    def test_a_socket_pair(self):
        for end in ("commit", "abort"):
            with self.subTest(end):
                self.write("write -P 1 0 8M", "write -z 8M 8M")
                ours, theirs = socket.socketpair()
                wire, backup, export, client = self.export(ours, theirs)
                self.assertEqual(export["size"], client.size)
                self.whole(client, "a")
                # The address is there for others.
                self.assertEqual(f"{client.size}\n", program("nbdinfo", "--size", export["uri"]))
                params = {"backup": backup} | ({"disks": ["dev-a"]} if end == "commit" else {})
                wire.call(f"backup.{end}", params)
                client.ends()
                wire.close()
                self.nothing_is_left()

    def test_tcp(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        wire, _, _, client = self.export(ours, theirs, "dev-b")
        self.whole(client, "b")
        wire.process.stdin.close()
        self.assertEqual(3, wire.wait())
        client.ends()
        self.nothing_is_left()

    def test_a_client_that_does_not_read(self):
        for end in ("commit", "abort"):
            with self.subTest(end):
                self.write("write -P 1 0 8M")
                ours, theirs = socket.socketpair()
                wire, backup, _, client = self.export(ours, theirs, checkpoint=end)
                for _ in range(8):
                    client.send(READ, 0, 8 * MIB)
                ours.recv(1)
                # What waits for the client, QEMU or we, would wait until it is given up.
                began = time.monotonic()
                params = {"backup": backup} | ({"disks": ["dev-a"]} if end == "commit" else {})
                self.assertEqual([], wire.call(f"backup.{end}", params)["leftovers"])
                self.assertLess(time.monotonic() - began, SOON / 2)
                client.ends()
                wire.close()
                self.nothing_is_left()

    def test_a_connection_outlives_requests_that_are_refused(self):
        ours, theirs = socket.socketpair()
        wire = Wire(self.rig.command(), pass_fds=[theirs.fileno()])
        self.addCleanup(wire.close)
        right = {"disk": "dev-a", "socket": f"fd:{theirs.fileno()}"}
        theirs.close()

        def refused(code, state="unchanged", **wrong):
            data = wire.reply(wire.send("backup.export", {**right, **wrong}))["error"]["data"]
            self.assertEqual((code, state), (data["code"], data["state_left"]))
            with self.assertRaises(BlockingIOError):
                ours.recv(1, socket.MSG_DONTWAIT)

        refused("unknown_backup", backup="0123456789")
        right["backup"] = wire.call("backup.begin", {"monitor": self.rig.monitor})["backup"]
        refused("unknown_disk", disk="dev-c")
        refused("invalid_params", more=1)
        # One that is refused only when QEMU's work is done.
        target = {"kind": "file", "path": str(self.places.folder / "pushed"), "format": "raw"}
        wire.call("backup.push", {"backup": right["backup"], "disk": "dev-b", "target": target})
        refused("offset_released", "disk_spent", disk="dev-b")
        wire.call("backup.export", right)
        with Nbd(ours, "dev-a") as client:
            self.assertEqual(b"\1" * 512, client.read(0, 512))

    def test_a_socket_has_one_use_at_a_time(self):
        """Who has it hears nothing of those who ask for it again."""
        ours, theirs = socket.socketpair()
        fd = f"fd:{theirs.fileno()}"
        wire = Wire(self.rig.command(), pass_fds=[theirs.fileno()])
        self.addCleanup(wire.close)
        backup = wire.call("backup.begin", {"monitor": self.rig.monitor})["backup"]
        params = {"backup": backup, "disk": "dev-a", "socket": fd}
        export = wire.call("backup.export", params)

        def refused(code, method, **other):
            error = wire.reply(wire.send(method, {"backup": backup, "disk": "dev-b", **other}))["error"]["data"]
            self.assertEqual((code, "backup_open"), (error["code"], error["state_left"]))

        with Nbd(ours, export["export"]) as client:
            self.assertEqual(export, wire.call("backup.export", params))
            self.assertEqual(b"\1" * 512, client.read(0, 512))
            refused("invalid_params", "backup.export", socket=fd)
            refused("target_refused", "backup.push", target={"kind": "nbd", "address": fd})
            self.assertEqual(b"\1" * 512, client.read(0, 512))
        # Nor is anything of the other disk's exported.
        names = [each["id"] for each in self.rig.qmp.command("query-block-exports")]
        self.assertEqual(1, len([name for name in names if name.endswith("-x")]), names)

    def test_what_is_no_socket(self):
        with open(self.places.folder / "a", "rb") as file:
            wire = Wire(self.rig.command(), pass_fds=[file.fileno()])
            self.addCleanup(wire.close)
            backup = wire.call("backup.begin", {"monitor": self.rig.monitor})["backup"]
            for wrong in (f"fd:{file.fileno()}", "fd:999", "fd:-1", "fd:", "unix:/dev/null", 7):
                params = {"backup": backup, "disk": "dev-a", "socket": wrong}
                error = wire.reply(wire.send("backup.export", params))["error"]["data"]
                self.assertEqual("invalid_params", error["code"], wrong)
            wire.call("backup.abort", {"backup": backup})
