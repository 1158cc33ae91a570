"""QEMU lets our NBD clients in while it drains: it does not stand still for them.

QEMU 10.0 waits, at the end of a drain, for each client that it has let in meanwhile, until that
hangs up; its guest waits too. A drain takes some time here: a job reads a slow disk without end,
and is waited for.
"""

import json
import threading
import time

from . import support
from .support import Backup, Rig, Vm, io, make_image, virtio

# What a read of the slow disk takes, in seconds, and with it a drain.
SLOW = 0.03
# A drain that takes longer has waited for a client, which hangs up after a second,
STOOD_STILL = 0.9
# and soon enough, on a busy machine too.
TOO_LONG = 10


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

    def test_drains_of_somebody_else_s(self):
        """One after the other, until one of them has let us in."""
        backup = Backup(self.plugin, self.rig.monitor)
        self.rig.oracle()
        job = {"job-id": "slow", "device": "slow", "target": "sink", "sync": "full", "x-perf": {"max-workers": 1}}
        self.rig.qmp.command("blockdev-backup", job)
        over = threading.Event()
        drains = []

        def drain():
            while not over.is_set() and max(drains, default=0) < STOOD_STILL:
                began = time.monotonic()
                self.rig.qmp.command("transaction", {"actions": []})
                drains.append(time.monotonic() - began)

        thread = threading.Thread(target=drain)
        thread.start()
        try:
            for _ in range(50):
                if not thread.is_alive():
                    break
                # Each connects anew.
                backup.read("dev-disk", self.rig.image("dev-disk"), release="on_ack")
        finally:
            over.set()
            thread.join()
        self.assertGreater(max(drains), STOOD_STILL, "no drain has let us in")
        self.assertLess(max(drains), TOO_LONG)
        self.rig.compare(self, backup, {"dev-disk": "disk"})
        backup.commit()
