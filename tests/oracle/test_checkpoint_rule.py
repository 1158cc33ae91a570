"""The checkpoint follows the host's word: a backup that is not committed costs nothing.

However a backup ends, nothing of its session stays, the base does, and the next backup
is incremental from that base, and right.
"""

import json
import os
import select
import signal
import subprocess
import sys

from . import support
from .guest import MIB, ROOT
from .support import Backup, Rig, Vm, Wire, io, make_image, virtio

# More than all buffers between QEMU and a host that does not read.
CHANGED = 24
NODES = {"dev-a": "a", "dev-b": "b"}
DEVICES = {disk: f"/machine/peripheral/{disk}/virtio-backend" for disk in NODES}


class CheckpointRule(support.Test):
    @classmethod
    def setUpClass(cls):
        cls.places = support.Places()
        cls.addClassCleanup(cls.places.close)
        qcow2, raw = cls.places.folder / "a.qcow2", cls.places.folder / "b.raw"
        make_image(qcow2, "qcow2", 64 * MIB)
        make_image(raw, "raw", 40 * MIB)
        cls.rig = Rig(Vm(virtio("a", qcow2) + virtio("b", raw, "raw")))
        cls.addClassCleanup(cls.rig.close)
        cls.tests = 0

    def setUp(self):
        """A full backup, its checkpoint `base`, and many changes since."""
        type(self).tests += 1
        self.base, self.lost = f"base{self.tests}", f"lost{self.tests}"
        for device in DEVICES.values():
            io(self.rig.qmp, device, f"write -P {self.tests} 0 8M")
        with self.rig.plugin() as plugin:
            full = self.backup(plugin, checkpoint=self.base)
            self.assertEqual(sorted(NODES), sorted(full.commit()["committed"]))
        for device in DEVICES.values():
            io(self.rig.qmp, device, f"write -P {self.tests + 100} 4M {CHANGED}M")
            io(self.rig.qmp, device, "write -z 0 1M")

    def backup(self, plugin, **params):
        """All streams of a new backup, held against the oracle."""
        backup = Backup(plugin, self.rig.monitor, **params)
        backup.read_all(self.rig)
        self.rig.compare(self, backup, NODES)
        return backup

    @property
    def params(self):
        return {"monitor": self.rig.monitor, "base": self.base, "checkpoint": self.lost}

    def nothing_has_happened(self):
        """Nothing of the lost backup is left, and the next one is relative to the base."""
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())
        for device in DEVICES.values():
            io(self.rig.qmp, device, "write -P 77 38M 64K")
            io(self.rig.qmp, device, "write -z 6M 1M")
        with self.rig.plugin() as plugin:
            for disk, names in self.rig.checkpoints(plugin).items():
                self.assertIn(self.base, names, disk)
                self.assertNotIn(self.lost, names, disk)
            backup = self.backup(plugin, base=self.base, checkpoint=f"next{self.tests}", strict=True)
            for stream in backup.streams.values():
                self.assertEqual(("incremental", self.base), (stream.begin["mode"], stream.begin["base"]))
                self.assertEqual({"zero"}, stream.kinds(6 * MIB, 7 * MIB))
                self.assertEqual({"same"}, stream.kinds(30 * MIB, 38 * MIB))
                self.assertEqual({"data"}, stream.kinds(38 * MIB, 38 * MIB + 65536))
            backup.commit()

    def reading(self):
        """A plugin in the middle of a stream that nobody reads."""
        wire = Wire(self.rig.command())
        self.addCleanup(wire.close)
        backup = wire.call("backup.begin", self.params)["backup"]
        stream = wire.send("backup.read", {"backup": backup, "disk": "dev-a", "record_max": 65536})
        while True:
            message, _ = wire.receive()
            self.assertNotEqual(stream, message.get("id"), message)
            if message.get("method") == "record" and message["params"]["record"]["kind"] == "data":
                return wire, backup, stream

    # --- ways to end without commit ---------------------------------------------------

    def test_the_host_is_killed(self):
        arguments = [json.dumps(self.rig.command()), json.dumps(self.params)]
        host = subprocess.Popen(
            [sys.executable, "-m", "oracle.host_to_kill", *arguments],
            cwd=ROOT / "tests",
            stdout=subprocess.PIPE,
        )
        with host:
            plugin = os.pidfd_open(int(host.stdout.readline()))
            host.kill()
        with os.fdopen(plugin):
            self.assertTrue(select.select([plugin], [], [], 30)[0], "the plugin outlives its host")
        self.nothing_has_happened()

    def test_standard_input_ends(self):
        wire, _, _ = self.reading()
        wire.process.stdin.close()
        self.assertEqual(3, wire.wait())
        self.nothing_has_happened()

    def test_standard_output_is_closed(self):
        wire, _, _ = self.reading()
        wire.process.stdout.close()
        self.assertEqual(3, wire.wait())
        self.nothing_has_happened()

    def test_signals(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            wire, _, _ = self.reading()
            wire.process.send_signal(number)
            if number != signal.SIGTERM:  # That one finds standard output stuck.
                while wire.receive():
                    pass
            self.assertEqual(3, wire.wait(), number)
            self.assertEqual([], support.ours(self.rig.qmp))
        self.nothing_has_happened()

    def test_abort_in_the_middle_of_a_stream(self):
        wire, backup, stream = self.reading()
        wire.pace = support.SLOWLY
        abort = wire.send("backup.abort", {"backup": backup})
        # Both are answered, in any order; the stream says that it is void.
        answers, kinds = {}, []
        while len(answers) < 2:
            message, _ = wire.receive()
            if "id" in message:
                answers[message["id"]] = message
            elif message["method"] == "record":
                kinds.append(message["params"]["record"]["kind"])
        self.assertEqual("cancelled", answers[stream]["error"]["data"]["code"])
        self.assertEqual({"leftovers": []}, answers[abort]["result"])
        self.assertEqual("failed", kinds[-1])
        wire.call("shutdown", {})
        self.assertEqual(0, wire.wait())
        self.nothing_has_happened()

    def test_shutdown_with_an_open_backup(self):
        wire, backup, _ = self.reading()
        self.assertEqual({"aborted": [backup], "leftovers": []}, wire.call("shutdown", {}))
        self.assertEqual(0, wire.wait())
        self.nothing_has_happened()

    def test_cancel_of_a_stream_leaves_the_backup_open(self):
        wire, backup, stream = self.reading()
        wire.pace = support.SLOWLY
        cancel = wire.send("cancel", {"id": stream})
        answers = {}
        while len(answers) < 2:
            message, _ = wire.receive()
            if "id" in message:
                answers[message["id"]] = message
        self.assertEqual({"found": True}, answers[cancel]["result"])
        data = answers[stream]["error"]["data"]
        self.assertEqual(("cancelled", "backup_open"), (data["code"], data["state_left"]))
        self.assertTrue(support.ours(self.rig.qmp))
        # It cannot be committed, and can be aborted.
        reply = wire.reply(wire.send("backup.commit", {"backup": backup}))
        self.assertEqual("incomplete", reply["error"]["data"]["code"])
        self.assertEqual("backup_open", reply["error"]["data"]["state_left"])
        self.assertEqual({"leftovers": []}, wire.call("backup.abort", {"backup": backup}))
        wire.close()
        self.nothing_has_happened()

    def test_cancel_of_begin(self):
        wire = Wire(self.rig.command())
        self.addCleanup(wire.close)
        for _ in range(5):
            begin = wire.send("backup.begin", self.params)
            wire.send("cancel", {"id": begin})
            reply = wire.reply(begin)
            if "error" in reply:  # Else it was done before.
                data = reply["error"]["data"]
                self.assertEqual(("cancelled", "unchanged"), (data["code"], data["state_left"]))
            else:
                wire.call("backup.abort", {"backup": reply["result"]["backup"]})
            self.assertEqual([], support.ours(self.rig.qmp))
        wire.close()
        self.nothing_has_happened()

    def test_a_backup_that_is_read_to_its_end_and_aborted(self):
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, **self.params)
            for disk in NODES:
                backup.read(disk, self.rig.folder / f"{disk}.spoilt")
            self.assertEqual({"leftovers": []}, backup.abort())
        self.nothing_has_happened()

    # --- commit -----------------------------------------------------------------------

    def test_commit_of_a_subset(self):
        with self.rig.plugin() as plugin:
            backup = self.backup(plugin, base=self.base, checkpoint="part")
            self.assertEqual(["dev-b"], backup.commit(disks=["dev-b"])["committed"])
            self.assertEqual([], support.ours(self.rig.qmp))
            checkpoints = self.rig.checkpoints(plugin)
            self.assertIn(self.base, checkpoints["dev-a"])
            self.assertNotIn("part", checkpoints["dev-a"])
            self.assertLessEqual({self.base, "part"}, set(checkpoints["dev-b"]))
            # dev-a goes on from the base, dev-b from the new one.
            io(self.rig.qmp, DEVICES["dev-b"], "write -P 3 20M 64K")
            disks = [{"disk": "dev-a", "base": self.base}, {"disk": "dev-b", "base": "part"}]
            after = self.backup(plugin, disks=disks, strict=True)
            self.assertLess(after.disks["dev-b"]["changed_bytes"], MIB)
            self.assertGreaterEqual(after.disks["dev-a"]["changed_bytes"], CHANGED * MIB)
            after.commit()

    def test_only_what_is_committed_must_have_been_read(self):
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, checkpoint="half")
            backup.read("dev-a", self.rig.folder / "half.image")
            params = {"backup": backup.id}
            data = self.refused("incomplete", plugin, "backup.commit", params)
            self.assertEqual("dev-b", data["disk"])
            self.refused("unknown_disk", plugin, "backup.commit", {**params, "disks": ["dev-c"]})
            self.assertEqual(["dev-a"], backup.commit(disks=["dev-a"])["committed"])
            self.assertIn("half", self.rig.checkpoints(plugin)["dev-a"])
            self.assertNotIn("half", self.rig.checkpoints(plugin)["dev-b"])

    def test_checkpoints_are_deleted_with_a_commit_only(self):
        with self.rig.plugin() as plugin:
            backup = self.backup(plugin, base=self.base, checkpoint="newer")
            result = backup.commit(delete_checkpoints=[self.base, "never-was"])
            self.assertEqual([f"{disk}/{self.base}" for disk in NODES], sorted(result["deleted"]))
            for names in self.rig.checkpoints(plugin).values():
                self.assertNotIn(self.base, names)
                self.assertIn("newer", names)
            full = self.backup(plugin, base=self.base)
            for disk in full.disks.values():
                self.assertEqual(("incremental", "full", "base_missing"),
                                 (disk["planned"], disk["mode"], disk["reason"]))
            full.abort()

    def test_a_word_is_taken_twice_and_not_taken_back(self):
        with self.rig.plugin() as plugin:
            backup = self.backup(plugin, base=self.base, checkpoint="twice")
            self.assertEqual(backup.commit(), backup.commit())
            self.refused("backup_ended", plugin, "backup.abort", {"backup": backup.id})
            self.refused("backup_ended", plugin, "backup.read", {"backup": backup.id, "disk": "dev-a"})
            backup = Backup(plugin, **self.params)
            self.assertEqual(backup.abort(), backup.abort())
            self.refused("backup_ended", plugin, "backup.commit", {"backup": backup.id})
            self.refused("unknown_backup", plugin, "backup.commit", {"backup": "aaaaaaaaaa"})
        self.nothing_has_happened()

    def test_an_older_base_is_a_differential(self):
        with self.rig.plugin() as plugin:
            first = self.backup(plugin, base=self.base, checkpoint="first")
            first.commit()
            io(self.rig.qmp, DEVICES["dev-a"], "write -P 9 36M 1M")
            both = self.backup(plugin, base=self.base, strict=True)
            self.assertGreaterEqual(both.disks["dev-a"]["changed_bytes"], (CHANGED + 1) * MIB)
            both.abort()
            self.assertIn("first", self.rig.checkpoints(plugin)["dev-a"])
