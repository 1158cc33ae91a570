"""Restore: the image is right, sparse and whole, or it is not there at all."""

import io as memory
import os
import pathlib
import subprocess

from . import support
from .guest import MIB, RIG
from .strace import TRACE, calls, traced
from .support import Backup, Rig, Vm, io, make_image, read_stream, virtio
from .targets import until

SIZE = 64 * MIB
DEVICE = "/machine/peripheral/dev-a/virtio-backend"
RECORDS_AT_A_TIME = 8


class Restore(support.Test):
    @classmethod
    def setUpClass(cls):
        """A full and two incrementals, which turn old data to zeros, and the image at each."""
        cls.places = support.Places()
        cls.addClassCleanup(cls.places.close)
        make_image(cls.places.folder / "a", "qcow2", SIZE)
        cls.streams, cls.images = [], []
        changes = [["write -P 1 0 8M", "write -P 2 40M 1M"], ["write -z 0 4M", "write -P 3 50M 64K"]]
        changes += [["write -P 4 2M 64K", "discard 40M 1M"]]
        with Rig(Vm(virtio("a", cls.places.folder / "a"))) as rig, rig.plugin() as plugin:
            base = None
            for number, commands in enumerate(changes):
                for command in commands:
                    io(rig.qmp, DEVICE, command)
                keep = cls.places.folder / f"{number}.stream"
                backup = Backup(plugin, rig.monitor, base=base, checkpoint=f"c{number}")
                backup.read("dev-a", rig.image("dev-a"), keep=keep)
                backup.commit()
                base = f"c{number}"
                cls.streams.append(keep.read_bytes())
                cls.images.append(cls.places.folder / f"{number}.raw")
                os.rename(rig.oracle()["a"], cls.images[-1])

    def setUp(self):
        self.target = self.places.folder / f"{self.id().rsplit('.')[-1]}.image"

    def restore(self, plugin, streams, format="raw", size=SIZE):
        """Restores a chain: the result of `restore.finish`."""
        begin = {"target": str(self.target), "format": format, "size": size}
        restore = plugin.call("restore.begin", begin, support.SECONDS)["restore"]
        waiting = []
        for stream in streams:
            for record, payload in stream:
                params = {"restore": restore, "record": record}
                waiting.append(plugin.start("restore.write", params, payload))
                if len(waiting) > RECORDS_AT_A_TIME:
                    waiting.pop(0).result(support.SECONDS)
        for future in waiting:
            future.result(support.SECONDS)
        self.assertFalse(self.target.exists(), "the target has its name before it is complete")
        return plugin.call("restore.finish", {"restore": restore}, support.SECONDS)

    def chain(self, count):
        return [read_stream(memory.BytesIO(stream)) for stream in self.streams[:count]]

    def hidden(self):
        """Images that have no name yet."""
        return list(self.places.folder.glob(".qf-*.partial"))

    def nothing_is_left(self):
        self.assertEqual([], self.hidden())
        self.assertEqual([], self.places.files())

    def test_a_raw_image_at_each_point_in_time(self):
        for carrier in ("framed", "inline"):
            for count in (1, 2, 3):
                with self.subTest(carrier=carrier, streams=count), self.places.plugin(carrier) as plugin:
                    result = self.restore(plugin, self.chain(count))
                    expected = {"target": str(self.target), "size": SIZE, "streams": count}
                    self.assertLessEqual(expected.items(), result.items())
                    self.assertEqual(f"c{count - 1}", result["checkpoint"])
                    self.assert_equal_files(self.target, self.images[count - 1], f"{count} streams")
                    self.target.unlink()
        self.nothing_is_left()

    def test_it_is_sparse(self):
        # What the chain holds at its end: 4 MiB of the first write, and two pieces.
        data = 4 * MIB + 2 * 65536
        for format in ("raw", "qcow2"):
            with self.subTest(format), self.places.plugin() as plugin:
                self.restore(plugin, self.chain(3), format)
                allocated = os.stat(self.target).st_blocks * 512
                self.assertLess(allocated, data + MIB)
                # QEMU reads it, and finds what the oracle has.
                raw = self.images[2]
                command = ["qemu-img", "compare", "-f", format, "-F", "raw", str(self.target), str(raw)]
                compared = subprocess.run(command, capture_output=True, text=True)
                self.assertEqual(0, compared.returncode, compared.stdout + compared.stderr)
                self.target.unlink()
        self.nothing_is_left()

    def test_it_is_durable_before_it_has_its_name(self):
        log = self.places.folder / "calls"
        for format in ("raw", "qcow2"):
            with self.subTest(format), support.Plugin(traced(self.places.command(), log, *TRACE)) as plugin:
                self.restore(plugin, self.chain(1), format)
                self.target.unlink()
            # Those of the storage daemon are before these.
            (synced, number, partial), named, folder = calls(log)[-3:]
            self.assertEqual(("named", partial, str(self.target)), named)
            self.assertEqual(("synced", str(self.places.folder)), folder[::2])
            self.assertEqual("synced", synced)
            self.assertIn(("opened", number, partial), calls(log))
        self.nothing_is_left()

    def test_the_target_exists(self):
        self.target.write_text("precious")
        with self.places.plugin() as plugin:
            params = {"target": str(self.target), "format": "raw", "size": SIZE}
            self.assertEqual("unchanged", self.refused("target_exists", plugin, "restore.begin", params)["state_left"])
            # One that comes up meanwhile is not overwritten either.
            self.target.unlink()
            restore = plugin.call("restore.begin", params)["restore"]
            for record, payload in read_stream(memory.BytesIO(self.streams[0])):
                plugin.start("restore.write", {"restore": restore, "record": record}, payload).result(60)
            self.target.write_text("precious")
            data = self.refused("target_exists", plugin, "restore.finish", {"restore": restore})
            self.assertEqual("aborted", data["state_left"])
        self.assertEqual("precious", self.target.read_text())
        self.nothing_is_left()

    def test_the_targets_folder_is_missing(self):
        with self.places.plugin() as plugin:
            params = {"target": "/proc/nothing/target", "format": "raw", "size": SIZE}
            self.refused("target_mismatch", plugin, "restore.begin", params)
            params["target"] = "relative"
            self.refused("invalid_params", plugin, "restore.begin", params)
        self.nothing_is_left()

    def test_the_disk_is_full(self):
        """On a small file system of its own, or with a bound on the size of files."""
        folder = self.places.folder / "small"
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4M", "tmpfs", str(folder)]).returncode == 0
        if mounted:
            self.addCleanup(subprocess.run, ["umount", str(folder)], check=True)
        self.target = folder / "target"
        program = ["prlimit", f"--fsize={4 * MIB}"] if not mounted else []
        plugin = support.Plugin([*program, *self.places.command()])
        with plugin:
            with self.assertRaises(support.PluginError) as caught:
                self.restore(plugin, self.chain(1), "qcow2")
            self.assertEqual("target_unwritable", caught.exception.code, caught.exception)
            self.assertEqual("aborted", caught.exception.data["state_left"])
            self.assertEqual([], os.listdir(folder))
        self.nothing_is_left()

    def test_there_is_no_storage_daemon(self):
        params = {"target": str(self.target), "format": "raw", "size": SIZE}
        for program in ("/nothing/there", "/bin/false", "no-such-program"):
            with self.places.plugin(more=["--storage-daemon", program]) as plugin:
                data = self.refused("storage_daemon_failed", plugin, "restore.begin", params)
                self.assertEqual("unchanged", data["state_left"])
            self.nothing_is_left()

    def test_the_storage_daemon_of_7_2(self):
        program = str(RIG / "qemu-7.2/qemu-storage-daemon")
        with self.places.plugin(more=["--storage-daemon", program]) as plugin:
            self.restore(plugin, self.chain(3), "qcow2")
            raw = ["qemu-img", "convert", "-O", "raw", str(self.target), f"{self.target}.raw"]
            subprocess.run(raw, check=True)
            self.assert_equal_files(f"{self.target}.raw", self.images[2], "7.2")
        self.nothing_is_left()

    def damaged(self, number, change):
        """The chain with stream `number`'s records changed by `change(records)`."""
        chain = [list(stream) for stream in self.chain(3)]
        change(chain[number])
        with self.places.plugin() as plugin:
            with self.assertRaises(support.PluginError) as caught:
                self.restore(plugin, chain)
            data = caught.exception.data
            self.assertEqual("stream_damaged", caught.exception.code, caught.exception)
            self.assertEqual((number, "aborted"), (data["stream"], data["state_left"]))
            self.assertFalse(self.target.exists())
            self.nothing_is_left()
            return data["offset"]

    def test_a_damaged_stream_is_named(self):
        def flip(records):
            record, payload = records[2]
            records[2] = (record, payload[:-1] + bytes([payload[-1] ^ 1]))

        def leave_out(records):
            del records[2]

        def other_digest(records):
            record, _ = records[-1]
            records[-1] = ({**record, "digest": "0" * 64}, None)

        self.assertEqual(MIB, self.damaged(0, flip))
        self.assertEqual(MIB, self.damaged(0, leave_out))
        self.assertEqual(SIZE, self.damaged(1, other_digest))

    def test_a_stream_without_an_end_is_none(self):
        self.assertEqual(SIZE, self.damaged(2, lambda records: records.pop()))

    def test_streams_in_the_wrong_order(self):
        chain = self.chain(3)
        with self.places.plugin() as plugin:
            with self.assertRaises(support.PluginError) as caught:
                self.restore(plugin, [chain[0], chain[2]])
            self.assertEqual("stream_damaged", caught.exception.code)
            self.assertEqual((1, 0), (caught.exception.data["stream"], caught.exception.data["offset"]))
        self.assertFalse(self.target.exists())
        self.nothing_is_left()

    def test_abort_and_end_of_file_leave_nothing(self):
        params = {"target": str(self.target), "format": "qcow2", "size": SIZE}
        for end in ("abort", "end of file", "shutdown"):
            wire = support.Wire(self.places.command())
            restore = wire.call("restore.begin", params)["restore"]
            if end == "abort":
                self.assertEqual({"leftovers": []}, wire.call("restore.abort", {"restore": restore}))
                self.nothing_is_left()
            if end == "shutdown":
                self.assertEqual([restore], wire.call("shutdown", {})["aborted"])
            wire.close()
            self.nothing_is_left()
            self.assertFalse(self.target.exists())

    def test_what_a_killed_one_leaves_goes_with_the_next(self):
        """And never what one leaves that lives."""
        names = [self.places.folder / name for name in ("killed", "living", "next")]
        wires = [support.Wire(self.places.command()) for _ in names]
        restores = []
        for name, wire in zip(names, wires):
            self.addCleanup(wire.close)
            params = {"target": str(name), "format": "raw", "size": SIZE}
            restores.append(wire.call("restore.begin", params)["restore"])
            if name.name == "killed":
                [killed] = self.hidden()
                wire.process.kill()
                wire.process.wait()
                self.assertEqual([], self.places.files())
                # The storage daemon dies of it, in a moment.
                number = f":{killed.stat().st_ino} "
                until(lambda: number not in pathlib.Path("/proc/locks").read_text())
            self.assertEqual({"killed": 1, "living": 1, "next": 2}[name.name], len(self.hidden()))
        self.assertFalse(killed.exists())
        for wire, restore in list(zip(wires, restores))[1:]:
            self.assertEqual({"leftovers": []}, wire.call("restore.abort", {"restore": restore}))
        self.nothing_is_left()
