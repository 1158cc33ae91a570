"""Many sessions against a guest that writes all the time, most of them disturbed.

`SOAK_SESSIONS=200 SOAK_SEED=N` runs longer, or as a run before did; `SOAK_SEED=new` looks
for more. Each committed backup is held against QEMU's own copy of its instant; at the end
nothing may be left, the guest knows of no error, and no process has grown.
"""

import contextlib
import os
import random
import secrets
import signal
import sys
import threading

from . import support
from .guest import MIB, Disk, Guest
from .support import Backup, PluginError, Rig

SEED = os.environ.get("SOAK_SEED") or "20261126"
SEED = secrets.randbits(32) if SEED == "new" else int(SEED)
SESSIONS = int(os.environ.get("SOAK_SESSIONS") or 12)
NODES = {"dev0": "disk0", "dev1": "disk1"}
# What disturbs a session; a third of them is left in peace.
FAULTS = ("abort", "cancel", "killed", "killed", "terminated", "host_gone", "full", "attached", "attached")
GROWTH = 64 * MIB


class Soak(support.Test):
    limit = 120 + 30 * SESSIONS

    def test_sessions(self):
        print(f"SOAK_SEED={SEED} SOAK_SESSIONS={SESSIONS}", file=sys.stderr)
        self.random = random.Random(SEED)
        self.log = []
        disks = [Disk(16 * MIB, iothread=True), Disk(16 * MIB, driver="virtio-scsi")]
        with Rig(Guest(disks)) as self.rig:
            self.guest = self.rig.machine
            for number in range(2):
                self.guest.run(f"write disk{number} 0 12M {number + 1}")
                self.guest.run(f"start w{number} disk{number} longest=128K seed={number} pause_ms=15 zero=10")
            self.base, self.plugin = None, None
            try:
                self.soak()
            except BaseException:
                print(f"SOAK_SEED={SEED} failed; the last sessions:", *self.log[-8:], sep="\n", file=sys.stderr)
                raise
            finally:
                if self.plugin:
                    self.plugin.close()

    def soak(self):
        self.session("none", 0)
        start = self.sizes()
        for number in range(1, SESSIONS):
            fault = self.random.choice(FAULTS) if self.random.random() < 2 / 3 else "none"
            self.session(fault, number)
        result = self.start_plugin().call("reclaim", {"monitor": self.rig.monitor}, support.SECONDS)
        self.assertEqual(([], []), (result["left"], result["leftovers"]))
        for number in range(2):
            self.assertGreater(self.guest.stat(f"stop w{number}")["writes"], SESSIONS)
        console = (self.guest.folder / "console").read_text(errors="replace")
        self.assertNotIn("I/O error", console)
        self.assertEqual("running", self.rig.qmp.command("query-status")["status"])
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())
        self.assertEqual([], self.rig.qmp.command("query-jobs"))
        fds, memory, plugin = self.sizes()
        self.log.append(f"at the start {start}, at the end {(fds, memory, plugin)}")
        print(self.log[-1], file=sys.stderr)
        self.assertLessEqual(fds, start[0])
        self.assertLess(memory - start[1], GROWTH)
        self.assertLess(plugin - start[2], GROWTH)
        bitmaps = {
            bitmap["name"]
            for node in self.rig.qmp.command("query-named-block-nodes", {"flat": True})
            for bitmap in node.get("dirty-bitmaps", [])
            if "name" in bitmap
        }
        self.assertEqual(2, len(bitmaps), bitmaps)

    def sizes(self):
        """QEMU's descriptors and memory, the plugin's memory."""
        qemu = self.rig.machine.process.pid
        return len(os.listdir(f"/proc/{qemu}/fd")), rss(qemu), rss(self.start_plugin()._process.pid)

    def start_plugin(self):
        if self.plugin is None:
            self.plugin = self.rig.plugin()
        return self.plugin

    def end_plugin(self, end):
        """Ends it as somebody does who does not ask."""
        end()
        self.plugin._process.wait(support.SECONDS)
        self.plugin.close()
        self.plugin = None

    def session(self, fault, number):
        name = f"n{number}"
        params = {"base": self.base, "checkpoint": name}
        if fault == "full":
            params["scratch"] = {"disk_max_bytes": MIB}
        if fault == "attached":
            params["keep_ms"] = 600_000
        self.log.append(f"{number}: {fault}, since {self.base}")
        backup = Backup(self.start_plugin(), self.rig.monitor, **params)
        for disk in backup.disks.values():
            self.assertEqual(disk["planned"], disk["mode"], disk.get("reason"))
        try:
            getattr(self, f"do_{fault}")(backup)
        finally:
            with contextlib.suppress(TimeoutError):
                self.rig.oracle()
                self.rig.forget()
        if fault in ("none", "attached"):
            self.base = name

    # --- sessions that are committed ------------------------------------------------------

    def read(self, backup, disk, **params):
        ways = [lambda: backup.read(disk, self.rig.image(disk), **params)]
        if not params:
            ways.append(lambda: self.push(backup, disk))
        self.random.choice(ways)()

    def push(self, backup, disk):
        stream = backup.streams[disk] = support.Stream(self.rig.image(disk))
        params = {"backup": backup.id, "disk": disk, "target": {"kind": "records"}}
        backup.plugin.start("backup.push", params, on_record=stream.take).result(support.SECONDS)
        stream.finish()

    def commit(self, backup):
        self.rig.compare(self, backup, NODES)
        done = backup.commit(delete_checkpoints=[self.base] if self.base else [])
        self.assertEqual((["dev0", "dev1"], []), (done["committed"], done["leftovers"]))

    def do_none(self, backup):
        for disk in NODES:
            self.read(backup, disk)
        self.commit(backup)

    def do_attached(self, backup):
        backup.read("dev0", self.rig.image("dev0"), release="on_ack")
        self.end_plugin(self.random.choice([self.plugin._process.kill, self.plugin._process.stdin.close]))
        params = {"monitor": self.rig.monitor, "backup": backup.id}
        again = Backup.of(self.start_plugin(), self.start_plugin().call("backup.attach", params, support.SECONDS))
        again.streams = backup.streams
        again.read("dev1", self.rig.image("dev1"))
        self.commit(again)

    # --- sessions that are not ------------------------------------------------------------

    def part(self, backup, then):
        """Reads into nothing; `then` runs once some records are there."""
        enough = threading.Event()
        seen = []

        def take(record, payload):
            seen.append(record)
            if len(seen) > 3:
                enough.set()

        futures = [
            backup.plugin.start("backup.read", {"backup": backup.id, "disk": disk, "record_max": 65536}, on_record=take)
            for disk in NODES
        ]
        self.assertTrue(enough.wait(support.SECONDS))
        then()
        for future in futures:
            future.exception(support.SECONDS)

    def do_abort(self, backup):
        self.part(backup, backup.abort)

    def do_cancel(self, backup):
        # The two streams are the last two requests.
        last = backup.plugin._next_id
        self.part(backup, lambda: [backup.plugin.start("cancel", {"id": id}) for id in (last, last + 1)])
        backup.abort()

    def do_killed(self, backup):
        self.part(backup, lambda: self.end_plugin(self.plugin._process.kill))

    def do_terminated(self, backup):
        self.part(backup, lambda: self.end_plugin(lambda: self.plugin._process.send_signal(signal.SIGTERM)))

    def do_host_gone(self, backup):
        self.part(backup, lambda: self.end_plugin(self.plugin._process.stdin.close))

    def do_full(self, backup):
        """The guest goes on writing until the point in time of a disk is given up."""
        for number in range(2):
            self.guest.run(f"write disk{number} 0 8M {self.random.randrange(1 << 16)}")
        for disk in NODES:
            try:
                backup.read(disk, self.rig.folder / f"{disk}.full")
            except PluginError as error:
                self.assertEqual("scratch_full", error.code)
                backup.streams[disk].close()
        backup.abort()


def rss(pid):
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
