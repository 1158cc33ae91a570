"""vm.inspect: which disks there are, under which names, and why some are left out."""

from . import support
from .guest import MIB
from .support import Backup, Rig, Vm, io, make_image

FILES = ["with_id", "no_id", "scsi", "busy", "nvme", "medium", "read_only", "drive", "firmware"]


class Discovery(support.Test):
    @classmethod
    def setUpClass(cls):
        cls.places = support.Places()
        cls.addClassCleanup(cls.places.close)
        for name in FILES:
            make_image(cls.path(name), "raw" if name == "firmware" else "qcow2", "4M")

    @classmethod
    def path(cls, name):
        return cls.places.folder / name

    def node(self, name, **more):
        options = "".join(f",{key}={value}" for key, value in more.items())
        named = f",node-name=n-{name}"
        return ["-blockdev", f"driver=qcow2{named},file.driver=file,file.filename={self.path(name)}{options}"]

    def boot(self):
        arguments = [
            *self.node("with_id"), "-device", "virtio-blk-pci,drive=n-with_id,id=system,iothread=io0",
            "-object", "iothread,id=io0",
            *self.node("no_id"), "-device", "virtio-blk-pci,drive=n-no_id",
            "-device", "virtio-scsi-pci,id=scsi0",
            *self.node("scsi"), "-device", "scsi-hd,bus=scsi0.0,drive=n-scsi,id=data",
            "-device", "virtio-scsi-pci,id=scsi1,iothread=io0",
            *self.node("busy"), "-device", "scsi-hd,bus=scsi1.0,drive=n-busy,id=busy",
            *self.node("nvme"), "-device", "nvme,drive=n-nvme,serial=s,id=fast",
            "-device", "scsi-cd,bus=scsi0.0,id=cd-empty",
            *self.node("medium", **{"read-only": "on"}), "-device", "scsi-cd,bus=scsi0.0,drive=n-medium,id=cd-full",
            *self.node("read_only", **{"read-only": "on"}), "-device", "virtio-blk-pci,drive=n-read_only,id=sealed",
            "-drive", f"if=virtio,format=qcow2,file={self.path('drive')}",
            "-drive", f"if=pflash,format=raw,file={self.path('firmware')}",
        ]  # fmt: skip
        rig = Rig(Vm(arguments))
        self.addCleanup(rig.close)
        return rig

    def inspect(self, rig):
        with rig.plugin() as plugin:
            return plugin.call("vm.inspect", {"monitor": rig.monitor})

    def test_names_are_stable_and_reasons_given(self):
        rig = self.boot()
        vm = self.inspect(rig)
        disks = {disk["disk"]: disk for disk in vm["disks"]}
        self.assertEqual(len(vm["disks"]), len(disks), "two disks of one name")
        for disk in vm["disks"]:
            self.assertFalse(disk["disk"].startswith("#"), disk)
            self.assertNotIn("block", disk["disk"].lower().removeprefix("virtio"), disk)
        usable = {name for name, disk in disks.items() if disk["excluded"] is None}
        self.assertEqual({"system", "n-no_id", "data", "busy", "fast", "virtio0"}, usable, disks)
        excluded = {disks[name]["excluded"] for name in ("cd-empty", "cd-full")}
        self.assertLessEqual(excluded, {"removable", "no_medium"})
        self.assertEqual("read_only", disks["sealed"]["excluded"])
        firmware = [disk for disk in disks.values() if disk["file"] == str(self.path("firmware"))]
        self.assertEqual(["unsupported_driver"], [disk["excluded"] for disk in firmware])
        self.assertEqual("io0", disks["system"]["iothread"])
        self.assertEqual("io0", disks["busy"]["iothread"], "its controller's")
        self.assertIsNone(disks["data"]["iothread"])
        for name in usable:
            self.assertEqual(("persistent", 4 * MIB), (disks[name]["tracking"], disks[name]["size"]))
        self.assertEqual(([], "10.0.2"), (vm["our_objects"], vm["qemu_version"]))
        # The same names after a restart.
        rig.qmp.command("quit")
        rig.machine.process.wait(support.SECONDS)
        self.assertEqual(list(disks), [disk["disk"] for disk in self.inspect(self.boot())["disks"]])

    def test_a_backup_takes_all_that_is_not_excluded(self):
        rig = self.boot()
        with rig.plugin() as plugin:
            backup = Backup(plugin, rig.monitor, checkpoint="one")
            self.assertEqual({"system", "n-no_id", "data", "busy", "fast", "virtio0"}, set(backup.disks))
            backup.read_all(rig)
            self.assertEqual(6, len(rig.oracle()))
            backup.commit()
            again = Backup(plugin, rig.monitor, base="one", strict=True)
            self.assertEqual({"incremental"}, {disk["mode"] for disk in again.disks.values()})
            again.abort()
            for disk in ("sealed", "cd-full", "cd-empty"):
                data = self.begin_refused("disk_excluded", plugin, rig, disk)
                self.assertEqual("unchanged", data["state_left"])
            self.begin_refused("unknown_disk", plugin, rig, "n-with_id")

    def begin_refused(self, code, plugin, rig, disk):
        params = {"monitor": rig.monitor, "disks": [{"disk": disk}]}
        data = self.refused(code, plugin, "backup.begin", params)
        self.assertEqual(disk, data["disk"])
        self.assertEqual([], support.ours(rig.qmp))
        return data

    def test_foreign_bitmaps_are_left_alone(self):
        rig = self.boot()
        device = "/machine/peripheral/system/virtio-backend"
        for name, disabled in (("theirs", False), ("libvirt-1", True), ("qemu-fleece", False)):
            arguments = {"node": "n-with_id", "name": name, "persistent": True, "disabled": disabled}
            rig.qmp.command("block-dirty-bitmap-add", {**arguments, "granularity": 4096})
        io(rig.qmp, device, "write -P 3 1M 64K")
        before = self.bitmaps(rig)
        with rig.plugin() as plugin:
            theirs = {"theirs": "foreign", "libvirt-1": "foreign", "qemu-fleece": "foreign"}
            self.assertEqual(theirs, self.listed(plugin, rig))
            for base, name in ((None, "one-x"), ("one-x", "two-x")):
                backup = Backup(plugin, rig.monitor, base=base, checkpoint=name, disks=[{"disk": "system"}])
                backup.read_all(rig)
                backup.commit(delete_checkpoints=[base] if base else [])
            Backup(plugin, rig.monitor, base="two-x", disks=[{"disk": "system"}]).abort()
            self.assertEqual({**theirs, "two-x": "usable"}, self.listed(plugin, rig))
        after = self.bitmaps(rig)
        self.assertEqual(before, {name: after[name] for name in before})

    def listed(self, plugin, rig):
        params = {"monitor": rig.monitor, "disks": ["system"]}
        (disk,) = plugin.call("checkpoint.list", params)["disks"]
        return {each["checkpoint"]: each["health"] for each in disk["checkpoints"]}

    def inspect_with(self, plugin, rig):
        return plugin.call("vm.inspect", {"monitor": rig.monitor})["disks"]

    def bitmaps(self, rig):
        nodes = rig.qmp.command("query-named-block-nodes", {"flat": True})
        found = next(node for node in nodes if node["node-name"] == "n-with_id").get("dirty-bitmaps", [])
        return {bitmap["name"]: bitmap for bitmap in found}

    def test_a_foreign_filter_is_named(self):
        """A disk under another program's job is left out, and says so when asked for by name."""
        rig = self.boot()
        make_image(self.path("copy"), "raw", "4M")
        node = {"driver": "file", "node-name": "copy", "filename": str(self.path("copy"))}
        rig.qmp.command("blockdev-add", node)
        job = {"job-id": "theirs", "device": "n-scsi", "target": "copy", "sync": "none"}
        rig.qmp.command("blockdev-backup", job)
        with rig.plugin() as plugin:
            found = {disk["disk"]: disk for disk in self.inspect_with(plugin, rig)}
            self.assertEqual("filter_node", found["data"]["excluded"])
            self.begin_refused("disk_excluded", plugin, rig, "data")

