"""An exported disk, read by programs of others while a guest writes on."""

import json
import os
import stat
import subprocess

from . import support
from .exports import ZERO, Machine, device, program
from .guest import MIB, Disk, Guest, all_write
from .nbd import DATA, READ, TRIM, WRITE, ZEROES, Nbd, NbdError, copy, dirty
from .support import DAEMON, DAEMON_7_2, QEMU, QEMU_7_2, QEMU_NEW, Backup, Rig, io, make_image
from .test_matrix import BusyDaemon

# The writers stay below; what happens above is known.
QUIET = 8 * MIB
NODES = {"dev0": "disk0", "dev1": "disk1", "dev2": "disk2"} | {name: name for name in ("disk0", "disk1")}
# The daemon gives all its disks one serial number.
DAEMON_DISKS = ["/dev/vda", "/dev/vdb"]


class Busy(support.Test):
    limit = 150

    def backups(self, rig, targets):
        """A full, an incremental of which all is readable, and one of which the changes are."""
        run = rig.machine.run
        for number, target in enumerate(targets):
            run(f"write {target} 0 {QUIET} {number + 1}")
            run(f"write {target} {QUIET} 8M {number + 1}")
            run(f"start w{number} {target} from=0 to={QUIET} zero=20 discard=20 seed={number + 1}")
        base = None
        with rig.plugin() as plugin:
            for step, keep in enumerate((False, True, False, True)):
                if base:
                    for target in targets:
                        self.change(run, target, QUIET + (step - 1) * 2 * MIB)
                params = {"base": base, "checkpoint": f"c{step}", "keep_unchanged": keep}
                backup = Backup(plugin, rig.monitor, **params)
                all_write(run, len(targets))
                exports = {disk: backup.call("export", disk=disk) for disk in backup.disks}
                self.assertEqual(len(targets), len(exports))
                for disk, export in exports.items():
                    image = rig.image(disk)
                    with self.subTest(disk=disk, base=base, keep_unchanged=keep):
                        self.export(export, backup.disks[disk])
                        if base and not keep:
                            self.changes(export, image)
                        else:
                            self.all(export, image)
                all_write(run, len(targets))
                copies = rig.oracle()
                for disk, export in exports.items():
                    with self.subTest(disk=disk, base=base, keep_unchanged=keep):
                        self.assert_equal_files(rig.image(disk), copies[NODES[disk]], disk)
                        self.maps(export, backup.disks[disk], copies[NODES[disk]], rig.folder / f"{disk}.before")
                    os.rename(copies[NODES[disk]], rig.folder / f"{disk}.before")
                self.assertEqual(sorted(exports), sorted(backup.commit()["committed"]))
                self.assertEqual([], support.ours(rig.qmp))
                base = f"c{step}"
        for number in range(len(targets)):
            run(f"stop w{number}")
        self.assertEqual([], rig.files())

    def change(self, run, target, at):
        """Old data that becomes zeros in two ways, and new data."""
        run(f"zeroout {target} {at} 512K")
        run(f"discard {target} {at + MIB // 2} 512K")
        run(f"write {target} {at + MIB} 64K 99")

    def export(self, export, disk):
        """The reply agrees with the backup's, and with what `nbdinfo` sees."""
        for member in ("size", "mode", "granularity"):
            self.assertEqual(disk[member], export[member], member)
        seen = json.loads(program("nbdinfo", "--json", export["uri"]))["exports"][0]
        self.assertEqual(export["export"], seen["export-name"])
        self.assertEqual(export["size"], seen["export-size"])
        self.assertIn(export["allocation_context"], seen["contexts"])
        for name in ("minimum", "preferred", "maximum"):
            self.assertEqual(export["block_size"][name], seen[f"block_size_{name}"])
        self.assertTrue(seen["is_read_only"])
        self.assertTrue(seen["can_multi_conn"])
        if disk["mode"] == "full":
            self.assertNotIn("changes_context", export)
        else:
            self.assertIn(export["changes_context"], seen["contexts"])

    def all(self, export, image):
        """The whole device, by programs that know nothing of backups."""
        self.assertEqual("all", export["readable"])
        program("nbdcopy", export["uri"], str(image))
        program("qemu-img", "convert", "-f", "raw", "-O", "raw", export["uri"], f"{image}.other")
        self.assert_equal_files(image, f"{image}.other", "nbdcopy's and qemu-img's")
        os.unlink(f"{image}.other")

    def changes(self, export, image):
        """What changed, into the image of the backup before; the rest cannot be read."""
        self.assertEqual("changed", export["readable"])
        with Nbd(export["address"], export["export"], export["changes_context"]) as client:
            ranges = dirty(client.status())
            copy(client, ranges, image)
            with self.assertRaises(NbdError):
                client.read(client.size - MIB, 512)  # Nobody writes there.
            client.read(*ranges[0])  # The connection goes on.
        with Nbd(export["address"], export["export"], export["allocation_context"]) as client:
            for offset, length in ranges:
                for start, piece, flags in client.status(offset, offset + length):
                    if flags & ZERO:
                        self.assertFalse(any(client.read(start, piece)), f"no zeros at {start}")
        for command in (["nbdcopy"], ["qemu-img", "convert", "-f", "raw", "-O", "raw"]):
            said = subprocess.run([*command, export["uri"], f"{image}.other"], capture_output=True)
            self.assertNotEqual(0, said.returncode, command)

    def maps(self, export, disk, image, before):
        """What programs say of the disk's parts is true of the oracle's image."""
        if export["readable"] == "all":
            holes = self.nbdinfo(export, export["allocation_context"])
            zeros = [(offset, length) for offset, length, flags in holes if flags & ZERO]
            self.assertTrue(zeros)
            found = json.loads(program("qemu-img", "map", "--output=json", "-f", "raw", export["uri"]))
            self.covers(export, [(each["start"], each["length"]) for each in found])
            zeros += [(each["start"], each["length"]) for each in found if each["zero"]]
            with open(image, "rb") as file:
                for offset, length in zeros:
                    file.seek(offset)
                    self.assertFalse(any(file.read(length)), f"no zeros at {offset}")
        if disk["mode"] == "incremental":
            ranges = dirty(self.nbdinfo(export, export["changes_context"]))
            self.assertEqual(disk["changed_bytes"], self.granules(ranges, disk["granularity"]))
            self.assertEqual(ranges, self.qemu_img_dirty(export))
            self.same_but_for(ranges, before, image)

    def nbdinfo(self, export, context):
        """`nbdinfo --map`, neighbours of one kind joined."""
        found = json.loads(program("nbdinfo", f"--map={context}", "--json", export["uri"]))
        extents = [(each["offset"], each["length"], each["type"]) for each in found]
        self.covers(export, [extent[:2] for extent in extents])
        return extents

    def qemu_img_dirty(self, export):
        """The dirty ranges as `qemu-img` tells them: as holes."""
        options = {
            "driver": "nbd",
            "server": {"type": "unix", "path": export["address"].removeprefix("unix:")},
            "export": export["export"],
            "x-dirty-bitmap": export["changes_context"],
        }
        found = json.loads(program("qemu-img", "map", "--output=json", f"json:{json.dumps(options)}"))
        return [(each["start"], each["length"]) for each in found if not each["data"]]

    def covers(self, export, ranges):
        at = 0
        for offset, length in ranges:
            self.assertEqual(at, offset)
            at += length
        self.assertEqual(export["size"], at)

    def granules(self, ranges, granularity):
        """The bytes of the ranges in whole granules."""
        return sum(-(-(offset + length) // granularity) * granularity - offset for offset, length in ranges)

    def same_but_for(self, ranges, before, after):
        """The images differ nowhere else."""
        with open(before, "rb") as one, open(after, "rb") as other:
            at, size = 0, os.path.getsize(after)
            for offset, length in [*ranges, (size, 0)]:
                one.seek(at)
                other.seek(at)
                self.assertEqual(one.read(offset - at), other.read(offset - at), f"from {at} to {offset}")
                at = offset + length

    def test_a_guest(self):
        self.guest(QEMU)

    def test_a_guest_of_a_new_qemu(self):
        self.guest(QEMU_NEW)

    def guest(self, qemu):
        disks = [
            # No multiple of anything but a sector.
            Disk(size=20 * MIB + 1536, format="raw", iothread=True),
            Disk(size=24 * MIB),
            Disk(size=20 * MIB + 512, cluster_size=2 * MIB, iothread=True),
        ]
        with Rig(Guest(disks, qemu=qemu)) as rig:
            self.backups(rig, ["disk0", "disk1", "disk2"])

    def test_a_storage_daemon(self):
        disks = [Disk(size=24 * MIB), Disk(size=20 * MIB + 512, format="raw")]
        with Rig(BusyDaemon(disks, DAEMON, QEMU)) as rig:
            self.backups(rig, DAEMON_DISKS)


class Reading(Machine):
    def test_qemu_io(self):
        with self.rig.plugin() as plugin:
            backup = self.begin(plugin)
            for disk, export in [(disk, backup.call("export", disk=disk)) for disk in backup.disks]:
                for command in ("read -P 1 0 8M", "read -P 0 8M 8M", f"read -P 0 16M {export['size'] % MIB}"):
                    program("qemu-io", "-r", "-f", "raw", "-c", command, export["uri"])
                write = ["qemu-io", "-f", "raw", "-c", "write 0 512", export["uri"]]
                said = subprocess.run(write, capture_output=True, text=True)
                self.assertIn("Permission denied", said.stderr, disk)

    def test_a_client_that_writes_all_the_same(self):
        with self.rig.plugin() as plugin:
            export = self.begin(plugin).call("export", disk="dev-a")
            with Nbd(export["address"], export["export"]) as client:
                for command, payload in ((WRITE, bytes(512)), (ZEROES, b""), (TRIM, b"")):
                    with self.assertRaises(NbdError):
                        client.request(command, 0, 512, payload)
                self.assertEqual(b"\1" * 512, client.read(0, 512))

    def test_clients_side_by_side(self):
        with self.rig.plugin() as plugin:
            backup = self.begin(plugin)
            exports = [backup.call("export", disk=disk) for disk in backup.disks]
            clients = [Nbd(each["address"], each["export"]) for each in exports * 3]
            for client in clients:
                client.send(READ, 0, 8 * MIB)
            for client in clients:  # Each has its answers, whichever is read first.
                pieces = [data[8:] for kind, data in client.answer() if kind == DATA]
                self.assertEqual(b"\1" * 8 * MIB, b"".join(pieces))
                client.close()

    def test_the_address_is_private_and_stays(self):
        with self.rig.plugin() as plugin:
            backup = self.begin(plugin)
            export = backup.call("export", disk="dev-a")
            self.assertEqual(export, backup.call("export", disk="dev-a"))
            with Nbd(export["address"], export["export"]) as client:
                self.assertEqual(export, backup.call("export", disk="dev-a"))
                client.read(0, 512)
            folder = os.path.dirname(export["address"].removeprefix("unix:"))
            self.assertEqual(0o700, stat.S_IMODE(os.stat(folder).st_mode))
            # An error is none of the export's business.
            params = {"backup": backup.id, "disk": "dev-c"}
            self.refused("unknown_disk", plugin, "backup.export", params)
            backup.abort()
            self.refused("backup_ended", plugin, "backup.export", {**params, "disk": "dev-a"})

    def test_what_is_acknowledged_is_given_back(self):
        with self.rig.plugin() as plugin:
            backup = self.begin(plugin)
            export = backup.call("export", disk="dev-a")
            with Nbd(export["address"], export["export"]) as client:
                for offset in (4 * MIB + 1, 4 * MIB + 1, 6 * MIB, client.size):
                    resume = backup.call("ack", disk="dev-a", offset=offset)["resume"]
                    self.assertTrue(offset - 65536 < resume <= offset)
                    for gone in (0, resume // 65536 * 65536 - 512):
                        with self.assertRaises(NbdError):
                            client.read(gone, 512)
                    rest = client.read(resume, client.size - resume)
                    self.assertEqual(b"\1" * (8 * MIB - resume), rest[: max(0, 8 * MIB - resume)])
                    self.assertFalse(any(rest[max(0, 8 * MIB - resume) :]))
            self.assertEqual([], backup.abort()["leftovers"])

    def test_what_is_not_exported_is_incomplete(self):
        with self.rig.plugin() as plugin:
            backup = self.begin(plugin, checkpoint="one")
            params = {"backup": backup.id}
            self.refused("incomplete", plugin, "backup.commit", params)
            export = backup.call("export", disk="dev-a")
            data = self.refused("incomplete", plugin, "backup.commit", params)
            self.assertEqual(("dev-b", "backup_open"), (data["disk"], data["state_left"]))
            program("nbdcopy", export["uri"], str(self.rig.image("dev-a")))
            self.assert_equal_files(self.rig.image("dev-a"), self.rig.oracle()["a"], "dev-a")
            self.rig.forget()
            self.assertEqual(["dev-a"], backup.commit(disks=["dev-a"])["committed"])
            self.nothing_is_left()
            # The host's word was taken.
            backup = self.begin(plugin, base="one", strict=True, disks=[{"disk": "dev-a"}])
            self.assertEqual("incremental", backup.disks["dev-a"]["mode"])
            export = backup.call("export", disk="dev-a")
            with Nbd(export["address"], export["export"], export["changes_context"]) as client:
                copy(client, dirty(client.status()), self.rig.image("dev-a"))
            self.assert_equal_files(self.rig.image("dev-a"), self.rig.oracle()["a"], "dev-a")

    def test_disks_of_hardly_any_size_and_a_folder_with_an_odd_name(self):
        sizes, arguments = {"c": 0, "d": 512, "e": 65536 + 512}, []
        for node, size in sizes.items():
            make_image(self.places.folder / node, "qcow2", size)
            arguments += ["--blockdev", support.blockdev(node, self.places.folder / node, "qcow2")]
        with Rig(support.Daemon(arguments)) as rig:
            rig.runtime = rig.folder / "a b#?ü"
            rig.runtime.mkdir()
            with rig.plugin() as plugin:
                backup = Backup(plugin, rig.monitor, checkpoint="one")
                for disk, size in sizes.items():
                    self.assertEqual(size, backup.call("map", disk=disk)["zero_bytes"])
                    uri = backup.call("export", disk=disk)["uri"]
                    self.assertEqual(f"{size}\n", program("nbdinfo", "--size", uri))
                    program("nbdcopy", uri, str(rig.image(disk)))
                    program("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, str(rig.image(disk)))
                    self.assert_equal_files(rig.image(disk), rig.oracle()[disk], disk)
                self.assertEqual(3, len(backup.commit()["committed"]))

    def test_a_base_that_cannot_serve(self):
        """The export is of a full then, and all of it readable."""
        with self.rig.plugin() as plugin:
            backup = self.begin(plugin, base="never-was")
            export = backup.call("export", disk="dev-a")
            self.assertEqual(("full", "all"), (export["mode"], export["readable"]))
            self.assertNotIn("changes_context", export)

    def test_another_try_after_qemu_has_refused(self):
        """Another program's export has the name, for a while."""
        with self.rig.plugin() as plugin:
            full = self.begin(plugin, checkpoint="one")
            full.read_all(self.rig)
            full.commit()
            backup = self.begin(plugin, base="one", strict=True)
            theirs = {"type": "nbd", "id": "theirs", "node-name": "b", "name": "dev-a"}
            self.rig.qmp.command("block-export-add", theirs)
            self.refused("qemu_refused", plugin, "backup.export", {"backup": backup.id, "disk": "dev-a"})
            self.rig.qmp.command("block-export-del", {"id": "theirs"})
            self.rig.qmp.wait_event("BLOCK_EXPORT_DELETED", id="theirs")
            export = backup.call("export", disk="dev-a")
            with Nbd(export["address"], export["export"], export["changes_context"]) as client:
                self.assertTrue(dirty(client.status()))
            self.assertEqual({"leftovers": []}, backup.abort())
        self.nothing_is_left()

    def test_what_did_not_change_costs_scratch_where_it_is_kept(self):
        sizes = {}
        for keep in (False, True):
            with self.rig.plugin() as plugin:
                self.write("write -P 3 0 16M")
                full = Backup(plugin, self.rig.monitor, checkpoint=f"base{keep}")
                full.read_all(self.rig)
                full.commit()
                backup = Backup(plugin, self.rig.monitor, base=f"base{keep}", keep_unchanged=keep)
                backup.call("export", disk="dev-a")
                before = self.rig.scratch_bytes()
                io(self.rig.qmp, device("dev-a"), "write -P 4 0 16M")
                sizes[keep] = self.rig.scratch_bytes() - before
        self.assertLess(sizes[False], MIB)
        self.assertGreaterEqual(sizes[True], 16 * MIB)


class Unsupported(Machine):
    qemu = QEMU_7_2

    def test_the_backup_goes_on(self):
        with self.rig.plugin() as plugin:
            backup = self.begin(plugin, checkpoint="one")
            params = {"backup": backup.id, "disk": "dev-a"}
            data = self.refused("qemu_unsupported", plugin, "backup.export", params)
            self.assertEqual("ask_operator", data["action"])
            self.refused("incomplete", plugin, "backup.commit", {"backup": backup.id})
            backup.read_all(self.rig)
            self.rig.compare(self, backup, {"dev-a": "a", "dev-b": "b"})
            self.assertEqual(2, len(backup.commit()["committed"]))

    def test_a_storage_daemon(self):
        make_image(self.places.folder / "c", "qcow2", 16 * MIB)
        arguments = ["--blockdev", support.blockdev("c", self.places.folder / "c", "qcow2")]
        with Rig(support.Daemon(arguments, DAEMON_7_2)) as rig, rig.plugin() as plugin:
            backup = Backup(plugin, rig.monitor)
            self.refused("qemu_unsupported", plugin, "backup.export", {"backup": backup.id, "disk": "c"})
