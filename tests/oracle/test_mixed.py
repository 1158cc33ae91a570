"""Pull, push and export in one backup, after one another, and in two backups at once."""

import subprocess

from . import support
from .guest import MIB
from .nbd import Nbd, copy, dirty
from .support import Backup, Rig, Stream, Vm, io, make_image, virtio

SIZES = {"a": 16 * MIB + 1536, "b": 20 * MIB, "c": 16 * MIB + 512}
FORMATS = {"a": "qcow2", "b": "qcow2", "c": "raw"}


def device(node):
    return f"/machine/peripheral/dev-{node}/virtio-backend"


class Mixed(support.Test):
    """Disk `dev-X` is node X. Each is copied into its image, one way or another."""

    limit = 120

    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        arguments = []
        for node, format in FORMATS.items():
            make_image(self.places.folder / node, format, SIZES[node])
            arguments += virtio(node, self.places.folder / node, format)
        self.rig = Rig(Vm(arguments))
        self.addCleanup(self.rig.close)
        self.plugin = self.rig.plugin()
        self.addCleanup(self.plugin.close)
        self.begun = 0
        self.files = 0
        self.write("write -P 1 0 8M", "write -P 2 15M 1M")

    def write(self, *commands, nodes=FORMATS):
        for node in nodes:
            for command in commands:
                io(self.rig.qmp, device(node), command)

    def change(self, number, nodes=FORMATS):
        """Of each kind; some is there at the next point in time, and some is new there."""
        at = number % 7
        self.write(
            f"write -P {number + 10} {at}M 192K",
            f"write -z {at + 1}M 192K",
            f"discard {at + 2}M 192K",
            f"write -P {number + 50} 16M 512",
            nodes=nodes,
        )

    def begin(self, nodes=FORMATS, **params):
        """A backup, whose instant the guest has left behind when this returns."""
        params = {"disks": [{"disk": f"dev-{node}"} for node in nodes], **params}
        backup = Backup(self.plugin, self.rig.monitor, **params)
        self.begun += 1
        backup.number, backup.nodes = self.begun, nodes
        self.write("write -P 99 3M 4M", "write -z 8M 1M", nodes=nodes)
        return backup

    def compare(self, backup, nodes=None):
        """The images are as the disks were when the backup began."""
        copies = self.rig.oracle(backup.number)
        for node in nodes or backup.nodes:
            self.assert_equal_files(self.image(node), copies[node], f"{node} of backup {backup.number}")

    def image(self, node):
        return self.rig.image(f"dev-{node}")

    def new(self):
        """A name for a file that is not there."""
        self.files += 1
        return self.rig.folder / f"file{self.files}"

    # --- the ways ---------------------------------------------------------------------

    def start(self, way, backup, node):
        """Starts to bring a node's image up to the backup: what waits for its end."""
        return getattr(self, way)(backup, f"dev-{node}", self.image(node))

    def pull(self, backup, disk, image):
        future = backup.start(disk, image)

        def wait():
            future.result(support.SECONDS)
            backup.streams[disk].finish()

        return wait

    def export(self, backup, disk, image):
        export = backup.call("export", disk=disk)

        def wait():
            context = export.get("changes_context")
            with Nbd(export["address"], export["export"], context) as client:
                copy(client, dirty(client.status()) if context else [(0, client.size)], image)

        return wait

    def push(self, backup, disk, image):
        """To a new qcow2 file, of an incremental over the image; `qemu-img` reads the two as one."""
        target = {"kind": "file", "path": str(self.new()), "format": "qcow2"}
        if backup.disks[disk]["mode"] == "incremental":
            target["backing"] = {"path": str(image), "format": "raw"}
        future = self.pushed(backup, disk, target)

        def wait():
            self.assertEqual(backup.disks[disk]["mode"], future.result(support.SECONDS)["mode"])
            self.convert(target["path"], image)

        return wait

    def overwrite(self, backup, disk, image):
        """To the image itself."""
        if not image.exists():
            make_image(image, "raw", backup.disks[disk]["size"])
        future = self.pushed(backup, disk, {"kind": "existing", "path": str(image), "format": "raw"})
        return lambda: future.result(support.SECONDS)

    def pushed(self, backup, disk, target):
        return self.plugin.start("backup.push", {"backup": backup.id, "disk": disk, "target": target})

    def convert(self, chain, image):
        new = self.new()
        subprocess.run(["qemu-img", "convert", "-O", "raw", chain, str(new)], check=True)
        new.rename(image)

    def nothing_is_left(self):
        """Of any backup, and no NBD server."""
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())
        address = {"type": "unix", "data": {"path": str(self.new())}}
        self.rig.qmp.command("nbd-server-start", {"addr": address})
        self.rig.qmp.command("nbd-server-stop")

    # --- one backup -------------------------------------------------------------------

    def test_each_way_for_one_disk(self):
        """Side by side, and of each disk after each other way."""
        ways = ["pull", "push", "export"]
        base = None
        for number in range(4):
            backup = self.begin(base=base, checkpoint=f"c{number}", strict=True)
            waits = [self.start(ways[(number + n) % 3], backup, node) for n, node in enumerate(FORMATS)]
            for wait in waits:
                wait()
            self.compare(backup)
            self.assertEqual(["dev-a", "dev-b", "dev-c"], sorted(backup.commit()["committed"]))
            self.nothing_is_left()
            base = f"c{number}"
            self.change(number)

    def test_a_disk_that_is_exported_and_pushed(self):
        """The push takes nothing away from the export's clients."""
        backup = self.begin("a", checkpoint="c0")
        export = backup.call("export", disk="dev-a")
        self.start("push", backup, "a")()
        self.compare(backup)
        subprocess.run(["nbdcopy", export["uri"], str(self.rig.image("dev-a"))], check=True)
        self.compare(backup)
        backup.commit()

    def test_each_way_after_each(self):
        ways = {"a": "pull", "b": "push", "c": "export", "d": "overwrite"}
        # Each pair of letters stands once side by side.
        order = [ways[letter] for letter in "aabacadbbcbdccdda"]
        self.assertEqual(16, len(set(zip(order, order[1:]))))
        base = None
        for number, way in enumerate(order):
            with self.subTest(way=way, after=order[number - 1] if number else None):
                backup = self.begin("c", base=base, checkpoint=f"c{number}", strict=True)
                self.start(way, backup, "c")()
                self.compare(backup)
                backup.commit(delete_checkpoints=[base] if base else [])
                self.nothing_is_left()
                base = f"c{number}"
                self.change(number, "c")

    def test_a_pushed_chain(self):
        """qcow2 files over each other, made by pushes alone; the last step is pulled onto it."""
        chain = None
        for number in range(3):
            backup = self.begin("ab", base=f"c{number - 1}" if number else None, checkpoint=f"c{number}", strict=True)
            files = {node: str(self.new()) for node in "ab"}
            for node, path in files.items():
                target = {"kind": "file", "path": path, "format": "qcow2"}
                if chain:
                    target["backing"] = {"path": chain[node], "format": "qcow2"}
                reply = self.pushed(backup, f"dev-{node}", target).result(support.SECONDS)
                changed = backup.disks[f"dev-{node}"]["changed_bytes"]
                self.assertLessEqual(reply["copied_bytes"], -(-changed // 65536) * 65536)
                subprocess.run(["qemu-img", "check", "-q", path], check=True)
                self.convert(path, self.image(node))
            chain = files
            self.compare(backup)
            backup.commit()
            self.change(number)
        backup = self.begin("ab", base="c2", strict=True)
        backup.read_all(self.rig)
        self.compare(backup)

    def test_records_from_a_push_and_from_a_pull_are_one_chain(self):
        base = None
        for number, method in enumerate(("push", "read", "push", "push", "read")):
            backup = self.begin(base=base, checkpoint=f"c{number}", strict=True)
            more = {"target": {"kind": "records"}} if method == "push" else {}
            futures = []
            for disk in backup.disks:
                stream = backup.streams[disk] = Stream(self.rig.image(disk))
                params = {"backup": backup.id, "disk": disk, **more}
                futures.append(self.plugin.start(f"backup.{method}", params, on_record=stream.take))
            for disk, future in zip(backup.disks, futures):
                digest = future.result(support.SECONDS)["digest"]
                backup.streams[disk].finish()
                self.assertEqual(digest, backup.streams[disk].end["digest"])
                self.assertEqual(base, backup.streams[disk].begin.get("base"))
            self.compare(backup)
            backup.commit()
            self.nothing_is_left()
            base = f"c{number}"
            self.change(number)

    # --- two backups at once ------------------------------------------------------------------

    def full(self):
        """All disks' images, and the checkpoint `monday`."""
        backup = self.begin(checkpoint="monday")
        backup.read_all(self.rig)
        self.compare(backup)
        backup.commit()
        self.change(1)

    def health(self):
        return {disk: sorted(found) for disk, found in self.rig.checkpoints(self.plugin).items()}

    def two(self, ways, first_ends, second_ends):
        """One on `a` and one on `b`, of different instants; the first ends while the second is read."""
        self.full()
        first = self.begin("a", base="monday", checkpoint="tuesday", strict=True)
        self.change(2)
        second = self.begin("b", base="monday", checkpoint="tuesday", strict=True)
        self.change(3)
        self.assertNotEqual(first.id, second.id)
        waits = [self.start(way, backup, node) for way, backup, node in zip(ways, (first, second), "ab")]
        export = second.call("export", disk="dev-b") if ways[1] != "push" else None
        self.change(4)
        waits[0]()
        self.compare(first)
        getattr(first, first_ends)()
        self.change(5)
        if export:
            with Nbd(export["address"], export["export"], export["changes_context"]) as client:
                client.read(*dirty(client.status())[0])
        waits[1]()
        self.compare(second)
        getattr(second, second_ends)()
        self.nothing_is_left()
        ends = {"dev-a": first_ends, "dev-b": second_ends, "dev-c": "abort"}
        expected = {disk: ["monday"] + ["tuesday"] * (end == "commit") for disk, end in ends.items()}
        self.assertEqual(expected, self.health())
        # Whatever became of them, the next is right.
        self.change(6)
        bases = [{"disk": disk, "base": names[-1]} for disk, names in expected.items()]
        after = self.begin(disks=bases, strict=True)
        # What was aborted has been applied all the same: an incremental from monday covers it.
        after.read_all(self.rig)
        self.compare(after)

    def test_two_backups_the_first_committed(self):
        self.two(("export", "export"), "commit", "abort")

    def test_two_backups_the_first_aborted(self):
        self.two(("pull", "export"), "abort", "commit")

    def test_two_backups_with_pushes(self):
        self.two(("push", "push"), "commit", "commit")

    def test_two_backups_with_clients_that_stay(self):
        """A client of the first is cut off, one of the second goes on."""
        backups = [self.begin("a"), self.begin("b")]
        exports = [backup.call("export", disk=f"dev-{node}") for backup, node in zip(backups, "ab")]
        clients = [Nbd(each["address"], each["export"]) for each in exports]
        for client in clients:
            self.addCleanup(client.close)
            self.assertEqual(b"\1" * 512, client.read(0, 512))
        backups[0].abort()
        clients[0].ends()
        self.change(0)
        copy(clients[1], [(0, clients[1].size)], self.image("b"))
        self.compare(backups[1])
        with Nbd(exports[1]["address"], exports[1]["export"]) as late:
            self.assertEqual(b"\1" * 512, late.read(0, 512))
        self.assertEqual([], self.plugin.close())
        clients[1].ends()
        self.nothing_is_left()

    def test_a_disk_has_one_backup(self):
        """A second one is refused, and costs the first nothing."""
        backup = self.begin("a", checkpoint="tuesday")
        params = {"monitor": self.rig.monitor, "disks": [{"disk": "dev-b"}, {"disk": "dev-a"}]}
        self.assertEqual("dev-a", self.refused("disk_excluded", self.plugin, "backup.begin", params)["disk"])
        self.begin("bc").abort()
        self.start("export", backup, "a")()
        self.compare(backup)
        self.assertEqual(["dev-a"], backup.commit()["committed"])
        self.nothing_is_left()

    # --- a backup and checkpoints -----------------------------------------------------

    def test_redefine_while_another_disk_is_exported(self):
        """Its ranges go through the same NBD server."""
        for way in ("export", "pull", "push"):
            with self.subTest(way):
                backup = self.begin("a")
                if way != "push":
                    wait = self.start(way, backup, "a")
                # The image of b is as of now; then some is written.
                copy_of = self.begin("b")
                self.start("pull", copy_of, "b")()
                copy_of.abort()
                changed = [[0, 9 * MIB], [12 * MIB, 65536]]
                self.write("write -P 77 12M 64K", nodes="b")
                disks = [{"disk": "dev-b", "changed": changed, "id": f"known{way}"}]
                params = {"monitor": self.rig.monitor, "checkpoint": "told", "disks": disks}
                told = self.plugin.call("checkpoint.redefine", params, support.SECONDS)["disks"][0]["checkpoints"][0]
                self.assertEqual(("usable", 9 * MIB + 65536), (told["health"], told["dirty_bytes"]))
                self.write("write -P 78 13M 64K", nodes="b")
                if way == "push":
                    wait = self.start(way, backup, "a")
                wait()
                self.compare(backup)
                backup.abort()
                self.nothing_is_left()
                after = self.begin("b", base="told", strict=True)
                self.assertEqual(9 * MIB + 2 * 65536, after.disks["dev-b"]["changed_bytes"])
                self.start("export", after, "b")()
                self.compare(after)
                after.abort()
