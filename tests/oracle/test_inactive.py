"""A QEMU whose images belong to another one: before a migration arrives, and after it has left."""

from .life import BASE, Life
from .support import QEMU_7_2, PluginError, Rig, Vm, virtio


class Inactive(Life):
    formats = {"a": "qcow2"}

    def setUp(self):
        super().setUp()
        self.boot()
        self.full()
        self.there = Rig(Vm([*self.disks(), "-incoming", "defer"], self.qemu))
        self.addCleanup(self.there.close)

    def migrate(self):
        address = f"unix:{self.places.folder}/migration"
        states = [{"capability": "dirty-bitmaps", "state": True}, {"capability": "events", "state": True}]
        for rig in (self.rig, self.there):
            rig.qmp.command("migrate-set-capabilities", {"capabilities": states})
        self.there.qmp.command("migrate-incoming", {"uri": address})
        self.rig.qmp.command("migrate", {"uri": address})
        for rig in (self.rig, self.there):
            rig.qmp.wait_event("MIGRATION", status="completed")

    def arrive(self):
        """The VM is at the other QEMU from here on."""
        self.migrate()
        self.there.qmp.command("cont")
        self.there.qmp.command("stop")
        self.kill()

    def attempt(self, rig, method, **params):
        """Whether it was done."""
        with rig.plugin() as plugin:
            try:
                plugin.call(method, {"monitor": rig.monitor, **params}, 60)
            except PluginError as error:
                self.assertEqual("unchanged", error.data["state_left"])
                return False
            return True

    def is_no_base(self, name):
        """It began after the changes of `full`, which it does not know, or is not there."""
        with self.there.plugin() as plugin:
            params = {"monitor": self.there.monitor, "base": name}
            (guess,) = plugin.call("backup.estimate", params)["disks"]
        self.assertEqual("full", guess["mode"], f"{name} lacks what was written at the source: {guess}")

    def test_what_waits_for_a_migration_gets_no_checkpoint(self):
        """The guest still writes at the source: nobody records it here."""
        made = self.attempt(self.there, "checkpoint.create", checkpoint="early")
        words = [{"disk": "dev-a", "changed": [[0, 65536]]}]
        said = self.attempt(self.there, "checkpoint.redefine", checkpoint="word", disks=words)
        self.write("write -P 7 13M 64K")
        self.arrive()
        self.is_no_base("early")
        self.is_no_base("word")
        self.assertEqual((False, False), (made, said))

    def test_what_waits_for_a_migration_is_not_backed_up(self):
        self.assertFalse(self.attempt(self.there, "backup.begin", checkpoint="early"))
        self.arrive()

    def test_the_source_of_a_migration_is_not_backed_up(self):
        """Its image belongs to the other QEMU."""
        self.migrate()
        self.assertFalse(self.attempt(self.rig, "backup.begin", base=BASE))
        self.assertFalse(self.attempt(self.rig, "checkpoint.create", checkpoint="late"))


class InactiveRaw(Inactive):
    formats = {"a": "raw"}


class InactiveIn72(Inactive):
    qemu = QEMU_7_2


class InactiveRawIn72(InactiveRaw):
    qemu = QEMU_7_2
