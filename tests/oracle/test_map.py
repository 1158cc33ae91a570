"""`backup.map`: what it calls data is all that has to be copied, and what it calls zero is zero."""

import contextlib
import signal
import subprocess

from . import support
from .guest import MIB
from .nbd import PIECE, Nbd
from .support import QEMU, QEMU_7_2, Backup, Rig, Stream, Vm, Wire, io, make_image, virtio

SIZES = {"dev-a": 40 * MIB + 1536, "dev-b": 40 * MIB + 512}
NODES = {"dev-a": "a", "dev-b": "b"}
BATCH = 4096
GRAIN = 4096
EXTENTS = 1 << 16


def device(disk):
    return f"/machine/peripheral/{disk}/virtio-backend"


class Maps(support.Test):
    """Disk `dev-a` is node a, qcow2 of small clusters; `dev-b` is b, raw."""

    qemu = QEMU
    limit = 120
    holes = True  # can be asked for

    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        qcow2, raw = self.places.folder / "a", self.places.folder / "b"
        make_image(qcow2, "qcow2", SIZES["dev-a"], "-o", f"cluster_size={GRAIN}")
        make_image(raw, "raw", SIZES["dev-b"])
        self.rig = Rig(Vm(virtio("a", qcow2) + virtio("b", raw, "raw"), self.qemu))
        self.addCleanup(self.rig.close)
        self.batches = []
        self.plugin = self.rig.plugin(on_notice=self.take)
        self.addCleanup(self.plugin.close)

    def take(self, method, params):
        if method == "extents":
            self.batches.append(params)

    def write(self, *commands, disks=NODES):
        for disk in disks:
            for command in commands:
                io(self.rig.qmp, device(disk), command)

    def begin(self, **params):
        return Backup(self.plugin, self.rig.monitor, **params)

    # --- what is held against the specification ----------------------------------------

    def map(self, backup, disk):
        """The extents of a disk, which obey every rule."""
        self.batches.clear()
        reply = backup.call("map", disk=disk)
        self.assertEqual(1, len({batch["stream"] for batch in self.batches}))
        offset, sums = 0, {"data": 0, "zero": 0, "same": 0}
        for batch in self.batches:
            self.assertEqual(disk, batch["disk"])
            self.assertTrue(1 <= len(batch["extents"]) <= BATCH)
            for start, length, kind in batch["extents"]:
                self.assertEqual(offset, start)
                self.assertGreater(length, 0)
                sums[kind] += length
                offset += length
        self.assertEqual(SIZES[disk], offset)
        extents = [tuple(extent) for batch in self.batches for extent in batch["extents"]]
        told = {f"{kind}_bytes": length for kind, length in sums.items()} | {"extents": len(extents)}
        self.assertEqual(told, reply)
        if backup.disks[disk]["mode"] == "full":
            self.assertEqual(0, sums["same"])
        else:
            self.assertLessEqual(sums["data"] + sums["zero"], backup.disks[disk]["changed_bytes"])
        return extents

    def source(self, backup, disk):
        """A function that reads a part of the disk: from its export."""
        export = backup.call("export", disk=disk)
        client = Nbd(export["address"], export["export"])
        self.addCleanup(client.close)
        return client.read

    def apply(self, extents, read, image):
        """Copies what is data, and writes zeros; the rest of the image stays."""
        with open(image, "r+b" if image.exists() else "w+b") as file:
            for offset, length, kind in extents:
                if kind == "same":
                    continue
                for at in range(offset, offset + length, PIECE):
                    piece = min(PIECE, offset + length - at)
                    file.seek(at)
                    file.write(read(at, piece) if kind == "data" else bytes(piece))

    def backup(self, disks=NODES, busy=True, **params):
        """A backup by its maps, while all is overwritten; each byte is held against the oracle."""
        backup = self.begin(disks=[{"disk": disk} for disk in disks], **params)
        if busy:
            self.write("write -P 200 0 24M", "write -z 24M 8M", "write -P 201 32M 1M", disks=disks)
        extents = {disk: self.map(backup, disk) for disk in disks}
        for disk in disks:
            self.apply(extents[disk], self.source(backup, disk), self.rig.image(disk))
        copies = self.rig.oracle()
        for disk in disks:
            self.assert_equal_files(self.rig.image(disk), copies[NODES[disk]], disk)
        self.rig.forget()
        self.assertEqual(sorted(disks), sorted(backup.commit()["committed"]))
        # QEMU 7.2 lets go of removed descriptors only while its processor runs.
        self.assertEqual([], [each for each in support.ours(self.rig.qmp) if not each.startswith("fdset")])
        return extents

    def kinds(self, extents, start, end):
        return {kind for offset, length, kind in extents if offset < end and offset + length > start}

    # --- tests ------------------------------------------------------------------------

    def test_a_full_and_incrementals(self):
        self.write("write -P 1 0 8M", "write -z 8M 1M", f"write -P 2 {40 * MIB} 512")
        for disk, extents in self.backup(checkpoint="c0").items():
            self.assertEqual({"data"}, self.kinds(extents, 0, 8 * MIB), disk)
            self.assertEqual({"zero" if self.holes else "data"}, self.kinds(extents, 9 * MIB, 39 * MIB), disk)
        for number in range(3):
            # All that was written once the backup before was open is changed, too.
            self.write(f"write -P 3 {33 + number}M 64K", f"discard {34 + number}M 64K", f"discard {number}M 512K")
            found = self.backup(base=f"c{number}", checkpoint=f"c{number + 1}", strict=True)
            for disk, extents in found.items():
                self.assertEqual({"data"}, self.kinds(extents, (33 + number) * MIB, (33 + number) * MIB + 65536), disk)
                changed = {"zero" if self.holes else "data"}
                self.assertEqual(changed, self.kinds(extents, number * MIB, number * MIB + MIB // 2), disk)
                self.assertEqual({"same"}, self.kinds(extents, 38 * MIB, SIZES[disk]), disk)

    def test_a_disk_that_is_empty_and_one_that_did_not_change(self):
        for disk, extents in self.backup(checkpoint="c0").items():
            # qemu-img writes the first sectors of a raw image.
            self.assertEqual({"zero" if self.holes else "data"}, self.kinds(extents, 65536, SIZES[disk]), disk)
        full = self.begin(checkpoint="c1")
        full.read_all(self.rig)
        full.commit()
        for disk, extents in self.backup(base="c1", checkpoint="c2").items():
            self.assertEqual([(0, SIZES[disk], "same")], extents)

    def many(self, pattern):
        """Every second grain of the first 20 MiB."""
        for at in range(0, 20 * MIB, 2 * GRAIN):
            io(self.rig.qmp, device("dev-a"), f"write -P {pattern} {at} {GRAIN}")

    def test_many_extents(self):
        self.many(1)
        fine = {"monitor": self.rig.monitor, "checkpoint": "fine", "granularity": GRAIN}
        self.plugin.call("checkpoint.create", fine, support.SECONDS)
        full = self.backup(["dev-a"], busy=False, checkpoint="coarse")["dev-a"]
        self.assertEqual(self.holes, len(full) > BATCH)
        self.many(2)
        changed = self.backup(["dev-a"], base="fine", checkpoint="next", strict=True)["dev-a"]
        self.assertGreater(len(changed), BATCH)
        self.assertEqual({"data", "same"}, {kind for _, _, kind in changed})

    def test_a_map_leaves_the_view(self):
        """It can be asked for again, before a stream, and counts as none."""
        self.write("write -P 1 0 8M")
        full = self.begin(checkpoint="c0")
        first = self.map(full, "dev-a")
        self.write("write -P 2 0 24M")
        self.assertEqual(first, self.map(full, "dev-a"))
        self.refused("incomplete", self.plugin, "backup.commit", {"backup": full.id})
        # What it calls data is what a stream reads.
        reply = full.read("dev-a", self.rig.image("dev-a"), release="on_ack")
        self.assertEqual(sum(length for _, length, kind in first if kind == "data"), reply["read_bytes"])
        self.assertEqual(first, self.map(full, "dev-a"))
        full.read("dev-b", self.rig.image("dev-b"))
        self.rig.compare(self, full, NODES)
        params = {"backup": full.id, "disk": "dev-b"}
        self.refused("offset_released", self.plugin, "backup.map", params)
        self.refused("unknown_disk", self.plugin, "backup.map", {**params, "disk": "dev-c"})
        self.assertEqual(2, len(full.commit()["committed"]))
        self.refused("backup_ended", self.plugin, "backup.map", params)

    def test_maps_and_streams_of_two_disks_side_by_side(self):
        self.write("write -P 1 0 8M")
        backup = self.begin()
        stream = backup.start("dev-b", self.rig.image("dev-b"))
        extents = self.map(backup, "dev-a")
        stream.result(support.SECONDS)
        backup.streams["dev-b"].finish()
        self.apply(extents, self.source(backup, "dev-a"), self.rig.image("dev-a"))
        copies = self.rig.oracle()
        for disk, node in NODES.items():
            self.assert_equal_files(self.rig.image(disk), copies[node], disk)


class MapsIn72(Maps):
    """No export there: the bytes come from a stream, after the map."""

    qemu = QEMU_7_2
    holes = False  # This QEMU answers wrongly.

    def source(self, backup, disk):
        path = self.rig.folder / f"{disk}.stream"
        path.unlink(missing_ok=True)
        backup.read(disk, path)
        file = open(path, "rb")
        self.addCleanup(file.close)

        def read(offset, length):
            file.seek(offset)
            return file.read(length)

        return read


class Hosts(support.Test):
    """A host that does not read while a map or a stream is under way."""

    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        image = self.places.folder / "a"
        self.many(image)
        self.rig = Rig(Vm(virtio("a", image)))
        self.addCleanup(self.rig.close)
        self.wire = Wire(self.rig.command())
        self.addCleanup(self.wire.close)
        began = self.wire.call("backup.begin", {"monitor": self.rig.monitor, "checkpoint": "one"})
        self.params = {"backup": began["backup"], "disk": "dev-a"}
        self.found = {}  # the replies that have come

    def many(self, image):
        """Far more extents than fit into what lies between the plugin and a host."""
        raw = image.with_name("raw")
        raw.write_bytes((b"\1" * 512 + bytes(512)) * (EXTENTS // 2))
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-S", "512", "-o", "cluster_size=512"]
        subprocess.run([*convert, str(raw), str(image)], check=True)
        raw.unlink()

    def outcomes(self, *ids):
        """The replies to these requests, as the errors' codes or the results."""
        while not set(ids) <= self.found.keys():
            message, _ = self.wire.receive()
            if "id" in message:
                error = message.get("error")
                self.found[message["id"]] = error["data"]["code"] if error else message["result"]
        return [self.found[id] for id in ids]

    @contextlib.contextmanager
    def held(self):
        """QEMU answers nothing meanwhile: no map comes to its end, and all that was sent has arrived."""
        self.rig.machine.process.send_signal(signal.SIGSTOP)
        yield
        self.outcomes(self.wire.send("ping", {}))
        self.rig.machine.process.send_signal(signal.SIGCONT)

    def the_stream_is_right(self):
        """Reads the disk, and commits it."""
        stream = Stream(self.rig.image("dev-a"))
        id = self.wire.send("backup.read", self.params)
        while True:
            message, payload = self.wire.receive()
            if message.get("id") == id:
                break
            if message.get("method") == "record":
                stream.take(message["params"]["record"], payload or None)
        stream.finish()
        self.assert_equal_files(self.rig.image("dev-a"), self.rig.oracle()["a"], "dev-a")
        self.assertEqual(["dev-a"], self.wire.call("backup.commit", {"backup": self.params["backup"]})["committed"])
        self.assertEqual([], support.ours(self.rig.qmp))

    def test_a_map_during_a_stream(self):
        stream = self.wire.send("backup.read", {**self.params, "release": "on_ack"})
        while self.wire.receive()[0].get("method") != "record":
            pass
        self.wire.pace = support.SLOWLY / 100  # For many small records.
        self.assertEqual(["stream_active"], self.outcomes(self.wire.send("backup.map", self.params)))
        self.wire.send("cancel", {"id": stream})
        self.assertEqual(["cancelled"], self.outcomes(stream))
        self.wire.pace = 0
        self.the_stream_is_right()

    def test_a_map_and_a_map(self):
        first, second = (self.outcomes(self.wire.send("backup.map", self.params))[0] for _ in range(2))
        self.assertEqual((EXTENTS, first), (first["extents"], second))
        with self.held():
            both = [self.wire.send("backup.map", self.params) for _ in range(2)]
        both = self.outcomes(*both)
        self.assertIn("stream_active", both)
        self.assertIn(first, both)

    def test_a_stream_during_a_map(self):
        with self.held():
            map = self.wire.send("backup.map", self.params)
            stream = self.wire.send("backup.read", self.params)
        self.assertEqual("stream_active", self.outcomes(map, stream)[1])

    def test_cancel(self):
        with self.held():
            map = self.wire.send("backup.map", self.params)
            cancel = self.wire.send("cancel", {"id": map})
        self.assertEqual(["cancelled", {"found": True}], self.outcomes(map, cancel))
        self.the_stream_is_right()

    def test_an_abort_during_a_map(self):
        with self.held():
            map = self.wire.send("backup.map", self.params)
            abort = self.wire.send("backup.abort", {"backup": self.params["backup"]})
        self.assertEqual(["cancelled", {"leftovers": []}], self.outcomes(map, abort))
        self.assertEqual([], support.ours(self.rig.qmp))

    def test_the_end_of_a_host_during_a_map(self):
        self.wire.send("backup.map", self.params)
        self.wire.process.stdin.close()
        self.assertEqual(3, self.wire.wait())
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())
