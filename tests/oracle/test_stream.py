"""A stream that breaks and goes on, its scratch, its records' size, its company."""

import threading
import time

from . import support
from .guest import MIB
from .support import Backup, Rig, Stream, Vm, Wire, io, make_image, virtio

SIZE = 96 * MIB
# Much more than the plugin holds (10 MiB) and the pipe takes is still to come when a test cancels.
DATA = 80 * MIB
NODES = {"dev-a": "a", "dev-b": "b"}


def device(disk):
    return f"/machine/peripheral/{disk}/virtio-backend"


class Part:
    """Takes a stream's records; cancels the request once enough bytes have come."""

    def __init__(self, plugin, backup, disk, enough, **params):
        self.records = []
        self._plugin, self._enough = plugin, enough
        self._cancelled = False
        params = {"backup": backup.id, "disk": disk, **params}
        # Records come before `start` has returned, which does not tell the id anyway.
        self._id = plugin._next_id
        self.error = plugin.start("backup.read", params, on_record=self._take).exception(support.SECONDS)

    def _take(self, record, payload):
        self.records.append((record, payload))
        if not self._cancelled and record.get("offset", 0) >= self._enough and "length" in record:
            self._cancelled = True
            self._plugin.start("cancel", {"id": self._id})
        if self._cancelled:
            # The rest has no room on its way here (see DATA).
            time.sleep(support.SLOWLY)

    def up_to(self, offset):
        """The records that end at or before an offset."""
        return [one for one in self.records if "length" in one[0] and one[0]["offset"] + one[0]["length"] <= offset]


class Streams(support.Test):
    def setUp(self):
        self.places = support.Places()
        self.addCleanup(self.places.close)
        for node in NODES.values():
            make_image(self.places.folder / node, "qcow2", SIZE)
        arguments = sum((virtio(node, self.places.folder / node) for node in NODES.values()), [])
        self.rig = Rig(Vm(arguments))
        self.addCleanup(self.rig.close)
        for number, disk in enumerate(NODES, 1):
            io(self.rig.qmp, device(disk), f"write -P {number} 0 {DATA}")

    # --- going on ---------------------------------------------------------------------

    def test_a_stream_goes_on_where_it_was_acknowledged(self):
        one = {"release": "on_ack", "record_max": 65536}
        for carrier in ("framed", "inline"):
            with self.subTest(carrier), self.rig.plugin(carrier) as plugin:
                backup = Backup(plugin, self.rig.monitor, disks=[{"disk": "dev-a"}])
                part = Part(plugin, backup, "dev-a", 10 * MIB, **one)
                self.assertEqual("cancelled", part.error.code)
                whole, resume = part.records[:1], 0
                for enough, said in ((20 * MIB, 5 * MIB + 1), (30 * MIB, 5 * MIB + 1), (40 * MIB, 25 * MIB - 1)):
                    resume = self.acknowledge(backup, part, said)
                    whole += part.up_to(resume)
                    self.assertEqual(resume, sum(record["length"] for record, _ in whole[1:]))
                    # The guest overwrites all: what is left must stay as it was.
                    io(self.rig.qmp, device("dev-a"), f"write -P {enough // MIB} 0 {SIZE}")
                    for wrong in {0, 65536, resume + 65536, SIZE} - {resume}:
                        params = {"backup": backup.id, "disk": "dev-a", "offset": wrong}
                        data = self.refused("offset_released", plugin, "backup.read", params)
                        self.assertEqual((resume, "backup_open"), (data["offset"], data["state_left"]))
                    part = Part(plugin, backup, "dev-a", enough, offset=resume, **one)
                    self.assertEqual("cancelled", part.error.code)
                    self.assertEqual(resume, part.records[0][0]["offset"])
                resume = self.acknowledge(backup, part, 33 * MIB + 4096)
                whole += part.up_to(resume)
                rest = Part(plugin, backup, "dev-a", 2 * SIZE, offset=resume, **one)
                self.assertIsNone(rest.error)
                self.assertEqual(["failed", "end"], [each.records[-1][0]["kind"] for each in (part, rest)])
                image = Stream(self.rig.image("dev-a"))
                for record, payload in whole + rest.records[1:]:
                    image.take(record, payload)
                image.finish()
                self.assert_equal_files(self.rig.image("dev-a"), self.rig.oracle()["a"], carrier)
                self.assertEqual({"leftovers": []}, backup.abort())

    def acknowledge(self, backup, part, offset):
        """Acknowledges; the answer must be the end of the last record that ends there."""
        resume = backup.call("ack", disk="dev-a", offset=offset)["resume"]
        ends = [record["offset"] + record["length"] for record, _ in part.records if "length" in record]
        self.assertLessEqual(resume, offset)
        start = part.records[0][0].get("offset") or 0
        self.assertEqual(max([start, *(end for end in ends if end <= offset)]), resume)
        return resume

    def test_what_is_released_as_it_is_read_is_gone(self):
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, checkpoint="one")
            part = Part(plugin, backup, "dev-a", 30 * MIB)
            self.assertEqual("cancelled", part.error.code)
            params = {"backup": backup.id, "disk": "dev-a"}
            data = self.refused("offset_released", plugin, "backup.read", params)
            # It was not acknowledged: the rest of the stream has no beginning.
            self.refused("offset_released", plugin, "backup.read", {**params, "offset": data["offset"]})
            self.refused("incomplete", plugin, "backup.commit", {"backup": backup.id})
            backup.read("dev-b", self.rig.image("dev-b"))
            self.refused("offset_released", plugin, "backup.read", {**params, "disk": "dev-b"})
            self.assertEqual(["dev-b"], backup.commit(disks=["dev-b"])["committed"])

    def test_a_disk_is_read_by_one_request_at_a_time(self):
        wire = Wire(self.rig.command())
        self.addCleanup(wire.close)
        backup = wire.call("backup.begin", {"monitor": self.rig.monitor})["backup"]
        params = {"backup": backup, "disk": "dev-a"}
        first = wire.send("backup.read", params)
        wire.receive()
        wire.pace = support.SLOWLY
        reply = wire.reply(wire.send("backup.read", params))
        wire.pace = 0
        data = reply["error"]["data"]
        self.assertEqual(("stream_active", "backup_open"), (data["code"], data["state_left"]))
        self.assertIn("result", wire.reply(first), "the first stream has suffered")
        wire.call("shutdown", {})

    # --- records ----------------------------------------------------------------------

    def test_records_are_no_longer_than_asked(self):
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor)
            for disk, most in (("dev-a", 65536), ("dev-b", 256 * 1024)):
                backup.read(disk, self.rig.image(disk), record_max=most)
                data = [each for each in backup.streams[disk].records if each["kind"] == "data"]
                self.assertEqual(DATA, sum(each["length"] for each in data))
                for each in data:
                    self.assertEqual(each["offset"] // most, (each["offset"] + each["length"] - 1) // most)
            self.rig.compare(self, backup, NODES)
            for odd in (0, 4096, 65537, 100_000, 2 * MIB):
                params = {"backup": backup.id, "disk": "dev-a", "record_max": odd}
                self.refused("invalid_params", plugin, "backup.read", params)
            backup.abort()

    def test_progress_goes_forward_and_not_too_often(self):
        notices = []

        def notice(method, params):
            if method == "progress":
                notices.append(params)

        with self.rig.plugin(on_notice=notice) as plugin:
            backup = Backup(plugin, self.rig.monitor)
            began = time.monotonic()
            # A slow host, so that there is something to tell.
            slow = threading.Event()
            futures = {
                disk: backup.start(disk, self.rig.image(disk), on_record=lambda _: slow.wait(0.02)) for disk in NODES
            }
            for disk, future in futures.items():
                future.result(support.SECONDS)
                backup.streams[disk].finish()
            seconds = time.monotonic() - began
            self.rig.compare(self, backup, NODES)
            backup.abort()
        self.assertGreater(seconds, 1)
        for disk in NODES:
            told = [params for params in notices if params["disk"] == disk]
            self.assertTrue(2 <= len(told) <= 4 * seconds + 2, f"{len(told)} in {seconds} s")
            self.assertEqual({SIZE}, {params["total"] for params in told})
            for member in ("done", "data_bytes"):
                values = [params[member] for params in told]
                self.assertEqual(sorted(values), values)
            self.assertEqual((SIZE, DATA), (told[-1]["done"], told[-1]["data_bytes"]))

    # --- scratch ----------------------------------------------------------------------

    def test_scratch_shrinks_as_the_stream_is_read(self):
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, disks=[{"disk": "dev-a"}])
            io(self.rig.qmp, device("dev-a"), f"write -P 9 0 {DATA}")
            self.assertGreaterEqual(self.rig.scratch_bytes(), DATA)
            backup.read("dev-a", self.rig.image("dev-a"))
            self.rig.compare(self, backup, NODES)
            self.assertLess(self.rig.scratch_bytes(), MIB)
            # What was read is not kept any more.
            io(self.rig.qmp, device("dev-a"), f"write -P 10 0 {DATA}")
            self.assertLess(self.rig.scratch_bytes(), MIB)
            backup.abort()

    def test_scratch_is_kept_until_it_is_acknowledged(self):
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, disks=[{"disk": "dev-a"}])
            io(self.rig.qmp, device("dev-a"), f"write -P 9 0 {DATA}")
            backup.read("dev-a", self.rig.image("dev-a"), release="on_ack")
            self.rig.compare(self, backup, NODES)
            self.assertGreaterEqual(self.rig.scratch_bytes(), DATA)
            backup.call("ack", disk="dev-a", offset=DATA // 2)
            self.assertLess(self.rig.scratch_bytes(), DATA // 2 + MIB)
            backup.call("ack", disk="dev-a", offset=SIZE)
            self.assertLess(self.rig.scratch_bytes(), MIB)
            backup.abort()

    def test_scratch_is_bounded_by_the_increment(self):
        with self.rig.plugin() as plugin:
            full = Backup(plugin, self.rig.monitor, checkpoint="one")
            full.read_all(self.rig)
            full.commit()
            io(self.rig.qmp, device("dev-a"), "write -P 5 8M 4M")
            backup = Backup(plugin, self.rig.monitor, base="one")
            self.assertEqual(4 * MIB, backup.disks["dev-a"]["changed_bytes"])
            for disk in NODES:
                io(self.rig.qmp, device(disk), f"write -P 6 0 {SIZE}")
            self.assertLess(self.rig.scratch_bytes(), 6 * MIB)
            backup.read_all(self.rig)
            self.rig.compare(self, backup, NODES)
            self.assertLess(self.rig.scratch_bytes(), 2 * MIB)
            backup.abort()
