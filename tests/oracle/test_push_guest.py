"""What a guest that writes and syncs all the time notices of a push: as good as nothing."""

import os
import time

from . import support
from .guest import MIB, Disk, Guest
from .pushes import SOME, SOON, TIMEOUT
from .support import QEMU, QEMU_7_2, Backup, Rig, Wire
from .targets import Nbdkit

SIZE = 32 * MIB
DELAY = 300  # ms, of each of the target's writes


class BusyGuest(support.Test):
    limit = 150
    qemu = QEMU
    iothread = True

    def setUp(self):
        self.rig = Rig(Guest([Disk(size=SIZE, iothread=self.iothread)], qemu=self.qemu))
        self.addCleanup(self.rig.close)
        self.guest = self.rig.machine
        self.guest.run("write disk0 0 24M 1")
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, checkpoint="monday")
            backup.read_all(self.rig)
            self.rig.compare(self, backup, {"dev0": "disk0"})
            backup.commit()
        self.guest.run("start w0 disk0 pause_ms=5")
        self.last = None
        self.image = self.rig.folder / "target.raw"
        self.image.touch()
        os.truncate(self.image, SIZE)
        self.server = self.nbdkit(f"delay-write={DELAY}ms")

    def nbdkit(self, delay):
        log, path = (self.rig.folder / f"{delay}.{kind}" for kind in ("log", "sock"))
        server = Nbdkit(self.image, log, delay, filters=["delay"], path=path)
        self.addCleanup(server.close)
        return server

    def begin(self, call):
        """An open backup, by `call`; the oracle's copy is done, which costs the guest more than a push."""
        backup = call("backup.begin", {"monitor": self.rig.monitor, "checkpoint": "never"})["backup"]
        self.copy = self.rig.oracle()["disk0"]
        # What this costs without a push.
        self.measure()
        self.guest.run("sh sleep 2")
        self.quiet = self.measure()
        return {"backup": backup, "disk": "dev0", "target": self.server.target(), "timeout_ms": TIMEOUT}

    def measure(self):
        """Writes a second, and the longest in ms, since the last time."""
        before, self.last = self.last, (time.monotonic(), self.guest.stat("stat w0"))
        rate = (self.last[1]["writes"] - before[1]["writes"]) / (self.last[0] - before[0]) if before else 0
        return rate, self.last[1]["worst_us"] / 1000

    def noticed_nothing(self):
        """The writer has written on since `begin`, and no write took much longer than without a push.

        The machine is noisy; a guest that waited for the target would wait for many of its writes.
        A guest that stands still measures nothing: the rate tells.
        """
        (quiet_rate, quiet), (rate, worst) = self.quiet, self.measure()
        figures = f"{quiet_rate:.0f} writes/s, worst {quiet:.0f} ms; with a push {rate:.0f}, worst {worst:.0f} ms"
        if os.environ.get("FIGURES"):
            print(figures)
        self.assertLess(worst, 10 * quiet + 250, figures)
        self.assertGreater(rate, quiet_rate / 5, figures)

    def the_base_serves(self):
        self.assertGreater(self.guest.stat("stop w0")["writes"], 0)
        self.assertEqual([], support.ours(self.rig.qmp))
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, base="monday", strict=True)
            backup.read_all(self.rig)
            self.rig.compare(self, backup, {"dev0": "disk0"})
            backup.abort()
        self.assertEqual([], self.rig.files())

    def test_slow(self):
        with self.rig.plugin() as plugin:
            params = self.begin(plugin.call)
            plugin.start("backup.push", params).result(support.SECONDS)
            self.noticed_nothing()
            self.assert_equal_files(self.image, self.copy, "the target")
            plugin.call("backup.abort", {"backup": params["backup"]}, support.SECONDS)
        self.the_base_serves()

    def test_slow_to_open(self):
        """A server that takes long to open its disk, once the client has named it."""
        self.server = self.nbdkit("delay-open=4")
        with self.rig.plugin() as plugin:
            params = {**self.begin(plugin.call), "timeout_ms": 10000}
            plugin.start("backup.push", params).result(support.SECONDS)
            self.noticed_nothing()
            plugin.call("backup.abort", {"backup": params["backup"]}, support.SECONDS)
        self.the_base_serves()

    def test_hung(self):
        with self.rig.plugin() as plugin:
            params = self.begin(plugin.call)
            future = plugin.start("backup.push", {**params, "workers": 2})
            self.server.wait_changes(SOME, future)
            self.server.suspend()
            error = future.exception(support.SECONDS)
            self.assertEqual("target_timeout", error.code, error)
            plugin.call("backup.abort", {"backup": params["backup"]}, support.SECONDS)
            self.noticed_nothing()
        self.the_base_serves()

    def test_the_plugin_is_killed_while_the_target_hangs(self):
        wire = Wire(self.rig.command())
        self.addCleanup(wire.close)
        wire.send("backup.push", {**self.begin(wire.call), "workers": 2})
        self.server.wait_changes(SOME)
        self.server.suspend()
        wire.process.kill()
        self.guest.run("sh sleep 3")
        self.noticed_nothing()
        began = time.monotonic()
        for command in ("stop", "cont"):
            self.rig.qmp.command(command)
        self.assertLess(time.monotonic() - began, SOON)
        self.assertGreater(self.guest.stat("stop w0")["writes"], 0)


class BusyGuestIn72(BusyGuest):
    """A disk on an iothread of this one is not backed up."""

    qemu = QEMU_7_2
    iothread = False
