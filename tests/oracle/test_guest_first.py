"""A host that takes nothing, or stands still, and a guest that must not notice; nor its freeze.

`STUCK_SECONDS=180` makes the host wait as long as it says.
"""

import os
import signal
import statistics
import time

from . import support
from .frozen import Frozen
from .guest import MIB, Disk, Guest
from .support import QEMU_7_2, Rig, Stream, Wire

STUCK = int(os.environ.get("STUCK_SECONDS") or 12)
WINDOW = 2  # seconds
# What the plugin may hold of a stream that nobody takes, and its own needs.
MEMORY = 96 * MIB
AT_ONCE = 2  # seconds, on a busy machine


class StuckHost(support.Test):
    limit = 120 + 2 * STUCK
    qemu = "qemu-system-x86_64"
    iothread = True

    def setUp(self):
        disks = [Disk(64 * MIB, iothread=self.iothread), Disk(64 * MIB, format="raw")]
        self.rig = Rig(Guest(disks, self.qemu))
        self.addCleanup(self.rig.close)
        self.guest = self.rig.machine
        for number in range(2):
            self.guest.run(f"write disk{number} 0 48M {number + 1}")
        self.guest.run("start w0 disk0 pause_ms=5")

    def worst(self, windows):
        """The longest write with its fdatasync of each window, in ms: their median; and the rate."""
        found, writes, began = [], 0, time.monotonic()
        self.guest.stat("stat w0")
        for _ in range(windows):
            before = self.guest.stat("stat w0")["writes"]
            self.guest.run(f"sh sleep {WINDOW}")
            now = self.guest.stat("stat w0")
            found.append(now["worst_us"] / 1000)
            writes += now["writes"] - before
        return statistics.median(found), writes / (time.monotonic() - began)

    def drain(self):
        """How long QEMU takes to wait for all I/O, once the machine has written what it has to."""
        os.sync()
        began = time.monotonic()
        for command in ("stop", "cont"):
            self.rig.qmp.command(command)
        return time.monotonic() - began

    def begin(self):
        self.wire = Wire(self.rig.command())
        self.addCleanup(self.wire.close)
        self.began = self.wire.call("backup.begin", {"monitor": self.rig.monitor, "checkpoint": "one"})
        self.copies = self.rig.oracle()
        params = {"backup": self.began["backup"], "record_max": 65536}
        self.asked = {self.wire.send("backup.read", {**params, "disk": f"dev{n}"}): f"dev{n}" for n in range(2)}

    def finish(self):
        """The host reads on: all of it is right."""
        streams = {disk: Stream(self.rig.image(disk)) for disk in self.asked.values()}
        left = dict(self.asked)
        while left:
            message, payload = self.wire.receive()
            if message.get("method") == "record":
                disk = self.asked[message["params"]["stream"]]
                streams[disk].take(message["params"]["record"], payload or None)
            elif message.get("id") in left:
                self.assertIn("result", message)
                del left[message["id"]]
        for disk, stream in streams.items():
            stream.finish()
            self.assert_equal_files(self.rig.image(disk), self.copies[disk.replace("dev", "disk")], disk)

    def test_a_host_that_takes_nothing(self):
        quiet, quiet_rate = self.worst(3)
        self.begin()
        windows = max(3, STUCK // (2 * WINDOW))
        first, first_rate = self.worst(windows)
        waited = self.drain()
        # A request is answered once the host reads again; it holds up nobody meanwhile.
        self.wire.send("ping", {})
        with open(f"/proc/{self.wire.process.pid}/statm") as file:
            memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        second, second_rate = self.worst(windows)
        waited = max(waited, self.drain())
        figures = (
            f"worst write {quiet:.0f} ms, {quiet_rate:.0f}/s; with a stuck host {first:.0f} and {second:.0f} ms, "
            f"{first_rate:.0f} and {second_rate:.0f}/s; drained in {waited:.2f} s; the plugin has {memory // MIB} MiB"
        )
        print(figures) if os.environ.get("FIGURES") else None
        self.assertLess(max(first, second), 4 * quiet + 150, figures)
        self.assertGreater(min(first_rate, second_rate), quiet_rate / 5, figures)
        self.assertLess(waited, AT_ONCE, figures)
        self.assertLess(memory, MEMORY, figures)
        self.finish()
        self.wire.call("backup.abort", {"backup": self.began["backup"]})
        self.assertEqual([], support.ours(self.rig.qmp))
        self.guest.run("stop w0")

    def test_a_plugin_that_stands_still(self):
        """SIGSTOP: nobody reads QEMU's answers. QEMU waits for them once it has to wait for
        all I/O; writes do not."""
        quiet, quiet_rate = self.worst(3)
        self.begin()
        self.wire.process.send_signal(signal.SIGSTOP)
        try:
            found, rate = self.worst(3)
        finally:
            self.wire.process.send_signal(signal.SIGCONT)
        figures = f"worst write {quiet:.0f} ms, {quiet_rate:.0f}/s; with a stopped plugin {found:.0f} ms, {rate:.0f}/s"
        print(figures) if os.environ.get("FIGURES") else None
        self.assertLess(found, 4 * quiet + 150, figures)
        self.assertGreater(rate, quiet_rate / 5, figures)
        self.finish()
        self.guest.run("stop w0")


class StuckHostOn72(StuckHost):
    """A disk on an iothread of this one is not backed up."""

    qemu = QEMU_7_2
    iothread = False


class BlockedHost(support.Test):
    limit = 90

    def test_a_host_that_does_not_read_holds_nobody_up(self):
        with Rig(Guest([Disk(size=96 * MIB, iothread=True)])) as rig:
            run = rig.machine.run
            run("write disk0 0 64M 1")
            run("start w disk0 from=64M")
            quiet = self.worst(rig)
            wire = Wire(rig.command())
            self.addCleanup(wire.close)
            backup = wire.call("backup.begin", {"monitor": rig.monitor})["backup"]
            rig.oracle()  # The second copy would cost the guest more than the backup.
            run("stat w")
            stream = wire.send("backup.read", {"backup": backup, "disk": "dev0"})
            wire.receive()
            # From here on nothing is read.
            blocked = self.worst(rig)
            self.assertLess(blocked, max(20 * quiet, 1_000_000), f"{quiet} us without backup")
            began = time.monotonic()
            for command in ("stop", "cont"):  # Each drains all disks.
                rig.qmp.command(command)
            self.assertLess(time.monotonic() - began, 5)
            ping, cancel = wire.send("ping", {}), wire.send("cancel", {"id": stream})
            abort = wire.send("backup.abort", {"backup": backup})
            # It is gone before anybody reads; the test's limit ends this.
            while support.ours(rig.qmp):
                pass
            answers = {}
            while len(answers) < 4:
                message, _ = wire.receive()
                if "id" in message:
                    answers[message["id"]] = message
            self.assertEqual({}, answers[ping]["result"])
            self.assertEqual({"found": True}, answers[cancel]["result"])
            self.assertEqual("cancelled", answers[stream]["error"]["data"]["code"])
            self.assertEqual({"leftovers": []}, answers[abort]["result"])
            run("stop w")

    def worst(self, rig):
        """The longest write of two seconds, in microseconds."""
        rig.machine.run("stat w")
        rig.machine.run("sh sleep 2")
        numbers = rig.machine.stat("stat w")
        self.assertGreater(numbers["writes"], 0)
        return numbers["worst_us"]


class FrozenGuest(Frozen):
    def test_frozen_for_less_than_200_ms(self):
        self.start()
        times = [1000]
        # The machine's other work gets in between, but not each time.
        while min(times) >= 200:
            self.assertLess(len(times), 30, times)
            found = self.abort(self.begin(self.consistency()))
            self.assertEqual(("agent", 2), (found["kind"], found["filesystems"]))
            times.append(found["frozen_ms"])
