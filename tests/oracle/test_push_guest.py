"""What a guest that writes and syncs all the time notices of a push: as good as nothing."""

import itertools
import os
import statistics
import time

from . import support
from .guest import MIB, Disk, Guest
from .pushes import SOME, SOON, TIMEOUT
from .support import QEMU, QEMU_7_2, Backup, Rig, Wire
from .targets import Nbdkit

SIZE = 16 * MIB
DELAY = 300  # ms, of each of the target's writes
ROUND = 0.5  # s, of one look at the guest
ROUNDS = 7  # looks at least
STILL = 2  # of them on end may find no write; `TIMEOUT` is four


class BusyGuest(support.Test):
    limit = 150
    qemu = QEMU
    iothread = True
    # Of writes of a MiB: so that the push takes as long as the guest is looked at.
    workers = 2

    def setUp(self):
        self.rig = Rig(Guest([Disk(size=SIZE, iothread=self.iothread)], qemu=self.qemu))
        self.addCleanup(self.rig.close)
        self.guest = self.rig.machine
        self.guest.run("write disk0 0 12M 1")
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, checkpoint="monday")
            backup.read_all(self.rig)
            self.rig.compare(self, backup, {"dev0": "disk0"})
            backup.commit()
        self.guest.run("start w0 disk0 pause_ms=5")
        self.quiet = self.rounds()

    def nbdkit(self, name, *parameters, filters=(), options=()):
        self.image = self.rig.folder / f"{name}.raw"
        self.image.touch()
        os.truncate(self.image, SIZE)
        log, path = (self.image.with_suffix(f".{kind}") for kind in ("log", "sock"))
        slow = [f"delay-write={DELAY}ms", *parameters]
        server = Nbdkit(self.image, log, *slow, filters=["delay", *filters], options=options, path=path)
        self.addCleanup(server.close)
        return server

    def begin(self, call):
        """An open backup, by `call`; the oracle's copy is done, which costs the guest more than a push."""
        backup = call("backup.begin", {"monitor": self.rig.monitor, "checkpoint": "never"})["backup"]
        self.copy = self.rig.oracle()["disk0"]
        return {"backup": backup, "disk": "dev0", "timeout_ms": TIMEOUT, "discard_source": False}

    def rounds(self, future=None):
        """(Writes a second, the longest of them in ms) of each round until the future is done."""
        found = []
        self.guest.stat("stat w0")
        before, began = self.guest.stat("stat w0"), time.monotonic()
        while len(found) < ROUNDS or future and not future.done():
            time.sleep(ROUND)
            now, at = self.guest.stat("stat w0"), time.monotonic()
            found.append(((now["writes"] - before["writes"]) / (at - began), now["worst_us"] / 1000))
            before, began = now, at
        return found

    def noticed_nothing(self, rounds):
        """The guest has written on as before there was a backup.

        Single rounds are noise. A guest that waited for the target would wait in most of them, or
        stand still for some on end.
        """
        middle = lambda rounds: [statistics.median(values) for values in zip(*rounds)]
        (quiet_rate, quiet), (rate, worst) = middle(self.quiet), middle(rounds)
        stretches = itertools.groupby(rounds, lambda each: each[0] == 0)
        still = max(len(list(stretch)) if is_still else 0 for is_still, stretch in stretches)
        figures = f"{quiet_rate:.0f} writes/s, longest {quiet:.0f} ms; with a push {rate:.0f}, longest {worst:.0f} ms"
        figures += f", {still} of {len(rounds)} rounds on end without a write"
        if os.environ.get("FIGURES"):
            print(figures)
        self.assertLess(worst, quiet + DELAY / 2, figures)
        self.assertGreater(rate, quiet_rate / 3, figures)
        self.assertLessEqual(still, STILL, figures)

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
        server = self.nbdkit("slow")
        with self.rig.plugin() as plugin:
            params = self.begin(plugin.call)
            push = plugin.start("backup.push", {**params, "target": server.target(), "workers": self.workers})
            self.noticed_nothing(self.rounds(push))
            push.result(support.SECONDS)
            self.assert_equal_files(self.image, self.copy, "the target")
            plugin.call("backup.abort", {"backup": params["backup"]}, support.SECONDS)
        self.the_base_serves()

    def test_slow_to_open(self):
        """A server that takes long to open its disk, once the client has named it."""
        server = self.nbdkit("slow", "delay-open=4")
        with self.rig.plugin() as plugin:
            params = {**self.begin(plugin.call), "timeout_ms": 10000}
            push = plugin.start("backup.push", {**params, "target": server.target(), "workers": self.workers})
            self.noticed_nothing(self.rounds(push))
            push.result(support.SECONDS)
            plugin.call("backup.abort", {"backup": params["backup"]}, support.SECONDS)
        self.the_base_serves()

    def test_targets_that_fail(self):
        full = self.rig.folder / "full"
        ways = {
            "hung": ("target_timeout", self.nbdkit("hung"), Nbdkit.suspend),
            "killed": ("target_failed", self.nbdkit("killed"), Nbdkit.kill),
            "full": (
                "target_unwritable",
                self.nbdkit("full", "error-pwrite=ENOSPC", "error-pwrite-rate=100%", f"error-pwrite-file={full}",
                            filters=["error"]),
                lambda _: full.touch(),
            ),
            # At once: there is no middle of it.
            "refused": ("target_mismatch", self.nbdkit("refused", options=["-r"]), None),
        }
        with self.rig.plugin() as plugin:
            params = self.begin(plugin.call)
            for way, (code, server, fail) in ways.items():
                with self.subTest(way):
                    push = plugin.start("backup.push", {**params, "target": server.target(), "workers": self.workers})
                    if fail:
                        server.wait_changes(SOME, push)
                        fail(server)
                    rounds = self.rounds(push)
                    error = push.exception(support.SECONDS)
                    self.assertEqual(code, error.code, error)
                    self.noticed_nothing(rounds)
            plugin.call("backup.abort", {"backup": params["backup"]}, support.SECONDS)
        self.the_base_serves()

    def test_the_plugin_is_killed_while_the_target_hangs(self):
        wire, server = Wire(self.rig.command()), self.nbdkit("hung")
        self.addCleanup(wire.close)
        wire.send("backup.push", {**self.begin(wire.call), "target": server.target()})
        server.wait_changes(SOME)
        server.suspend()
        wire.process.kill()
        self.noticed_nothing(self.rounds())
        began = time.monotonic()
        for command in ("stop", "cont"):
            self.rig.qmp.command(command)
        self.assertLess(time.monotonic() - began, SOON)
        self.assertGreater(self.guest.stat("stop w0")["writes"], 0)


class BusyGuestIn72(BusyGuest):
    """A disk on an iothread of this one is not backed up."""

    qemu = QEMU_7_2
    iothread = False
    # Its writes are of a cluster.
    workers = 16
