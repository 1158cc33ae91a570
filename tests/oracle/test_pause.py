"""A guest that is paused for the instant, and who is killed between."""

import os
import signal

from . import support
from .agent import Gate
from .frozen import SECONDS, guardian_of, wait_for
from .machines import Vm, make_image, virtio
from .support import QEMU, QEMU_7_2, Rig, Wire, ours


class Paused(support.Test):
    qemu = QEMU

    def setUp(self):
        places = support.Places()
        self.addCleanup(places.close)
        image = places.folder / "a.img"
        make_image(image, "qcow2", "8M")
        self.rig = Rig(Vm(virtio("a", image, "qcow2"), qemu=self.qemu), places.folder, proxy=Gate)
        self.addCleanup(self.rig.close)
        self.gate = self.rig.proxy
        self.wire = Wire(self.rig.command())
        self.addCleanup(self.wire.close)
        self.params = {"monitor": self.rig.monitor, "consistency": {"kind": "pause"}}

    def status(self):
        return self.rig.qmp.command("query-status")["status"]

    def reach(self):
        self.rig.qmp.command("cont")
        self.gate.shut()
        id = self.wire.send("backup.begin", self.params)
        self.assertTrue(self.gate.reached.wait(SECONDS))
        self.assertEqual("paused", self.status())
        return id

    def test_while_it_runs(self):
        id = self.reach()
        self.gate.open()
        found = self.wire.reply(id)["result"]["consistency"]
        self.assertEqual("pause", found["kind"])
        self.assertEqual("running", self.status())
        self.assertNotIn("frozen_ms", found)
        self.assertGreater(found["paused_ms"], 0)

    def test_what_did_not_run_does_not_run_afterwards(self):
        before = self.status()
        found = self.wire.call("backup.begin", self.params)["consistency"]
        self.assertEqual({"kind": "pause", "paused_ms": 0}, found)
        self.assertEqual(before, self.status())

    def test_the_plugin_is_killed(self):
        self.reach()
        self.wire.process.kill()
        self.wire.wait()
        self.gate.drop()
        wait_for("running", lambda: self.status() == "running")

    def test_somebody_continues_it(self):
        id = self.reach()
        self.rig.qmp.command("cont")
        self.gate.open()
        self.assertEqual("consistency_lost", self.wire.reply(id)["error"]["data"]["code"])
        self.assertEqual([], ours(self.rig.qmp))

    def test_cancelled(self):
        id = self.reach()
        self.wire.call("cancel", {"id": id})
        self.gate.open()
        self.assertEqual("cancelled", self.wire.reply(id)["error"]["data"]["code"])
        self.assertEqual("running", self.status())
        self.assertEqual([], ours(self.rig.qmp))

    def test_the_guardian_is_killed(self):
        id = self.reach()
        os.kill(guardian_of(self.wire.process.pid), signal.SIGKILL)
        self.gate.open()
        self.assertEqual("pause", self.wire.reply(id)["result"]["consistency"]["kind"])
        self.assertEqual("running", self.status())


class PausedQemu7(Paused):
    qemu = QEMU_7_2
