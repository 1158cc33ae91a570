"""QEMU's NBD server is stopped with the last backup, whoever is connected: QEMU lives on."""

import socket
import time

from .life import BASE, Life
from .support import QEMU_7_2, QEMU_NEW, SECONDS, Backup, Wire


class Server(Life):
    formats = {"a": "qcow2"}

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()
        self.mutes = []

    def mute(self):
        """A client that has been greeted, and says nothing."""
        (path,) = self.rig.runtime.glob("*/nbd.sock")
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        self.mutes.append(client)
        client.settimeout(SECONDS)
        client.connect(str(path))
        self.assertEqual(b"NBDMAGIC", client.recv(8))

    def ended(self):
        """All is gone, and QEMU does what it is told."""
        self.assertEqual([], self.left())
        self.assertEqual([], self.rig.files())
        self.change()
        self.next_is({"dev-a": None}, ids=True)

    def test_a_mute_client(self):
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, base=BASE)
            self.mute()
            self.assertEqual([], backup.abort()["leftovers"])
            self.ended()

    def test_a_mute_client_of_a_killed_plugin(self):
        wire = Wire(self.rig.command())
        wire.call("backup.begin", {"monitor": self.rig.monitor, "base": BASE})
        self.mute()
        wire.process.kill()
        wire.close()
        with self.rig.plugin() as plugin:
            self.assertEqual([], Backup(plugin, self.rig.monitor, base=BASE).abort()["leftovers"])
        self.ended()

    def test_a_socket_that_was_passed_and_not_served(self):
        """Nobody accepts who looks whether somebody listens there."""
        wire = Wire(self.rig.command())
        self.rig.proxy.on_command = lambda name: name == "getfd" and wire.process.kill()
        wire.send("backup.begin", {"monitor": self.rig.monitor, "base": BASE})
        self.assertEqual(-9, wire.wait())
        wire.close()
        self.rig.proxy.on_command = lambda name: None
        began = time.monotonic()
        self.call("reclaim")
        self.assertLess(time.monotonic() - began, 15)
        self.ended()


class ServerOf72(Server):
    """It would wait for a client that negotiates, and not listen to it."""

    qemu = QEMU_7_2

    def test_somebody_stays(self):
        """The server does, too: a standstill of the VM would be worse."""
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, base=BASE)
            aborted = plugin.start("backup.abort", {"backup": backup.id})
            while not aborted.done():
                self.mute()  # QEMU hangs up on each after ten seconds.
                time.sleep(1)
            (left,) = aborted.result()["leftovers"]
            self.assertIn("connections that stay", left)
            self.assertEqual("prelaunch", self.rig.qmp.command("query-status")["status"])
            for client in self.mutes:
                client.close()
            self.refused("nbd_server_busy", plugin, "backup.begin", {"monitor": self.rig.monitor})
            self.rig.qmp.command("nbd-server-stop")
            self.assertEqual([], Backup(plugin, self.rig.monitor, base=BASE).abort()["leftovers"])


class ServerOfNew(Server):
    qemu = QEMU_NEW
