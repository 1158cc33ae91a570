"""QEMU lets our NBD clients in while it drains: it does not stand still for them.

QEMU 10.0 waits, at the end of a drain, for each client that it has let in meanwhile, until that
hangs up; its guest waits too. A drain takes some time here: a job reads a slow disk without end,
and is waited for.
"""

import contextlib
import json
import threading
import time

from . import support
from .guest import MIB
from .nbd import Nbd
from .support import Backup, Rig, Vm, io, make_image, virtio

# What a read of the slow disk takes, in seconds, and with it a drain.
SLOW = 0.03
# A drain that takes longer has waited for a client, which hangs up after a second or three,
STOOD_STILL = 0.9
# and soon enough, on a busy machine too.
TOO_LONG = 10


class Drains:
    """One drain of QEMU after the other, in a thread, until one of them has stood still."""

    def __init__(self, qmp):
        self.seconds = []
        self._qmp = qmp
        self._over = False
        self._ended = threading.Condition()
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def _drain(self):
        while not self._over and not self.stood_still():
            began = time.monotonic()
            self._qmp.command("transaction", {"actions": []})
            with self._ended:
                self.seconds.append(time.monotonic() - began)
                self._ended.notify_all()

    def stood_still(self):
        return max(self.seconds, default=0) > STOOD_STILL

    def pass_by(self):
        """Returns when one has begun and ended, or there are no more."""
        with self._ended:
            before = len(self.seconds)
            done = self._ended.wait_for(lambda: self.stood_still() or len(self.seconds) > before + 1, TOO_LONG)
        if not done:
            raise AssertionError("QEMU stands still")

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over = True
        self._thread.join(TOO_LONG)


class Standstill(support.Test):
    limit = 120

    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        image = self.places.folder / "disk"
        make_image(image)
        arguments = virtio("disk", image)
        slow = {"driver": "null-co", "node-name": "slow", "size": 1 << 30, "latency-ns": int(SLOW * 1e9)}
        for options in (slow, {"driver": "null-co", "node-name": "sink", "size": 1 << 30}):
            arguments += ["-blockdev", json.dumps(options)]
        self.rig = Rig(Vm(arguments))
        self.addCleanup(self.rig.close)
        self.plugin = self.rig.plugin()
        self.addCleanup(self.plugin.close)
        io(self.rig.qmp, "/machine/peripheral/dev-disk/virtio-backend", "write -P 7 1M 1M")
        self.backup = Backup(self.plugin, self.rig.monitor)
        self.rig.oracle()
        job = {"job-id": "slow", "device": "slow", "target": "sink", "sync": "full", "x-perf": {"max-workers": 1}}
        self.rig.qmp.command("blockdev-backup", job)

    def come_and_go(self, connect):
        """Until a drain has let us in."""
        with Drains(self.rig.qmp) as drains:
            for _ in range(50):
                if drains.stood_still():
                    break
                connect(drains)
        self.assertTrue(drains.stood_still(), "no drain has let us in")
        self.assertLess(max(drains.seconds), TOO_LONG)

    def test_our_own_reading(self):
        image = self.rig.image("dev-disk")
        self.come_and_go(lambda _: self.backup.read("dev-disk", image, release="on_ack"))
        self.rig.compare(self, self.backup, {"dev-disk": "disk"})
        self.backup.commit()

    def test_a_client_of_the_host_s(self):
        """It may be cut off, and can come again."""
        export = self.backup.call("export", disk="dev-disk")

        def stay(drains):
            with contextlib.suppress(ConnectionError), Nbd(export["address"], export["export"]):
                drains.pass_by()

        self.come_and_go(stay)
        with Nbd(export["address"], export["export"]) as client:
            self.assertEqual(b"\7" * 512, client.read(MIB, 512))
        self.backup.commit()
