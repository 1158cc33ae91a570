"""Several VMs that begin together."""

import time

from . import support
from .support import Backup, Rig, Vm, io, make_image, ours, virtio

SECONDS = support.SECONDS


class Group(support.Test):
    def setUp(self):
        self.rigs = []
        for node in ("a", "b"):
            places = support.Places()
            self.addCleanup(places.close)
            image = places.folder / f"{node}.img"
            make_image(image, "qcow2", "8M")
            rig = Rig(Vm(virtio(node, image, "qcow2")), places.folder)
            self.addCleanup(rig.close)
            io(rig.qmp, f"/machine/peripheral/dev-{node}/virtio-backend", "write -P 7 1M 1M")
            self.rigs.append(rig)
        self.plugin = self.rigs[0].plugin()
        self.addCleanup(self.plugin.close)

    def members(self, **params):
        return [{"monitor": rig.monitor, "checkpoint": "monday", **params} for rig in self.rigs]

    def begin(self, members):
        return self.plugin.call("backup.begin_group", {"members": members}, SECONDS)

    def test_each_is_a_backup_of_its_own(self):
        began = time.monotonic()
        result = self.begin(self.members())
        took = time.monotonic() - began
        # Both transactions are done before either view is opened.
        self.assertGreater(result["skew_us"], 0)
        self.assertLess(result["skew_us"], took * 1_000_000)
        self.assertEqual(2, len(result["backups"]))
        for rig, node, reply in zip(self.rigs, "ab", result["backups"]):
            io(rig.qmp, f"/machine/peripheral/dev-{node}/virtio-backend", "write -P 9 0 8M")
            backup = Backup.of(self.plugin, reply)
            backup.read_all(rig)
            rig.compare(self, backup, {f"dev-{node}": node})
            self.assertEqual([f"dev-{node}"], backup.commit()["committed"])
            self.assertEqual([], ours(rig.qmp))

    def test_all_or_none(self):
        broken = self.members()
        broken[1]["base"] = "never"
        broken[1]["strict"] = True
        data = self.refused("base_unusable", self.plugin, "backup.begin_group", {"members": broken})
        self.assertEqual("unchanged", data["state_left"])
        for rig in self.rigs:
            self.assertEqual([], ours(rig.qmp))
        self.assertEqual(2, len(self.begin(self.members())["backups"]))

    def test_what_is_no_group(self):
        for members in ([], [self.members()[0]] * 2, self.members() * 33):
            self.refused("invalid_params", self.plugin, "backup.begin_group", {"members": members})
