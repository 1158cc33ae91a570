"""Errors that need a real QEMU: their codes, and that they leave everything as it was."""

import os
import socket
import subprocess
import threading

from . import support
from .guest import MIB, Disk, Guest
from .support import QEMU_7_2, Backup, Rig, Vm, io, make_image, virtio

DEVICE = "/machine/peripheral/dev-a/virtio-backend"


class Refusals(support.Test):
    @classmethod
    def setUpClass(cls):
        cls.places = support.Places()
        cls.addClassCleanup(cls.places.close)
        make_image(cls.places.folder / "a", "qcow2", 64 * MIB)

    def setUp(self):
        self.rig = Rig(Vm(virtio("a", self.places.folder / "a")))
        self.addCleanup(self.rig.close)

    def begin_refused(self, code, monitor=None, **params):
        params = {"monitor": monitor or self.rig.monitor, **params}
        with self.rig.plugin() as plugin:
            data = self.refused(code, plugin, "backup.begin", params)
        self.assertEqual("unchanged", data["state_left"])
        self.assertEqual([], data.get("leftovers", []))
        self.nothing_is_left()
        return data

    def nothing_is_left(self):
        self.assertEqual([], support.ours(self.rig.qmp))
        self.assertEqual([], self.rig.files())

    # --- the monitor ------------------------------------------------------------------

    def test_another_client_has_the_monitor(self):
        path = self.rig.machine.qmp[2]  # the test's own
        self.assertEqual("retry", self.begin_refused("monitor_busy", f"unix:{path}")["action"])

    def test_nobody_is_at_the_monitors_address(self):
        self.begin_refused("monitor_unreachable", f"unix:{self.places.folder}/nothing")
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))  # It does not listen.
            self.begin_refused("monitor_unreachable", f"tcp:127.0.0.1:{deaf.getsockname()[1]}")

    def test_what_is_at_the_address_is_no_monitor(self):
        path = f"{self.places.folder}/other"
        with socket.socket(socket.AF_UNIX) as listener, self.rig.plugin() as plugin:
            listener.bind(path)
            listener.listen()
            future = plugin.start("vm.inspect", {"monitor": path})
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"SSH-2.0-other\r\n")
                self.assertEqual("monitor_protocol", future.exception(support.SECONDS).code)

    # --- QEMU -------------------------------------------------------------------------

    def test_somebody_elses_nbd_server_goes_on(self):
        theirs = f"{self.places.folder}/theirs.sock"
        address = {"type": "unix", "data": {"path": theirs}}
        self.rig.qmp.command("nbd-server-start", {"addr": address})
        self.assertEqual("retry", self.begin_refused("nbd_server_busy")["action"])
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(theirs)
            self.assertEqual(b"NBDMAGIC", client.recv(8))
        self.rig.qmp.command("nbd-server-stop")

    def test_no_room_for_scratch(self):
        self.begin_refused("scratch_unavailable", scratch={"dir": f"{self.places.folder}/nothing"})
        self.begin_refused("scratch_unavailable", scratch={"dir": "/proc/self"})

    def test_a_checkpoint_of_that_name(self):
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, checkpoint="one")
            backup.read("dev-a", self.rig.image("dev-a"))
            backup.commit()
        data = self.begin_refused("checkpoint_exists", checkpoint="one")
        self.assertEqual("dev-a", data["disk"])

    def test_a_disk_on_an_iothread_of_qemu_7_2(self):
        """Reading it over NBD would end QEMU."""
        disks = [Disk(size=8 * MIB), Disk(size=8 * MIB, iothread=True)]
        disks += [Disk(size=8 * MIB, iothread=True, driver="virtio-scsi")]
        with Rig(Guest(disks, qemu=QEMU_7_2)) as rig, rig.plugin() as plugin:
            for disk in ("dev1", "dev2"):
                params = {"monitor": rig.monitor, "disks": [{"disk": disk}]}
                data = self.refused("qemu_unsupported", plugin, "backup.begin", params)
                self.assertEqual((disk, "unchanged"), (data["disk"], data["state_left"]))
                rig.machine.run(f"write disk{disk[-1]} 0 64K 1")
            self.assertEqual([], support.ours(rig.qmp))
            # The disk without an iothread of the same VM can be backed up.
            backup = Backup(plugin, rig.monitor, disks=[{"disk": "dev0"}])
            backup.read("dev0", rig.image("dev0"))
            rig.compare(self, backup, {"dev0": "disk0"})
            backup.abort()
            rig.machine.run("write disk0 0 64K 1")

    # --- behind our back --------------------------------------------------------------

    def open(self, plugin):
        io(self.rig.qmp, DEVICE, "write -P 7 0 48M")
        return Backup(plugin, self.rig.monitor, checkpoint="never")

    def hold(self, backup):
        """A stream that stands still after its first data: its future, and how it goes on."""
        arrived, go_on = threading.Event(), threading.Event()

        def wait(record):
            if record["kind"] == "data":
                arrived.set()
                go_on.wait(support.SECONDS)

        future = backup.start("dev-a", self.rig.image("dev-a"), on_record=wait)
        self.assertTrue(arrived.wait(support.SECONDS))
        return future, go_on

    def test_somebody_gives_a_part_of_the_view_back(self):
        """QEMU refuses what it has forgotten; that is never zeros."""
        with self.rig.plugin() as plugin:
            backup = self.open(plugin)
            (server,) = [each for each in os.listdir(self.rig.runtime) if each.endswith("-nbd")]
            url = f"nbd+unix:///qf-{backup.id}-0-acc?socket={self.rig.runtime}/{server}/nbd.sock"
            subprocess.run(["qemu-io", "-f", "raw", "-c", "discard 16M 1M", url], check=True, stdout=subprocess.DEVNULL)
            error = backup.start("dev-a", self.rig.image("dev-a")).exception(support.SECONDS)
            self.assertEqual(("nbd_refused", "backup_open"), (error.code, error.data["state_left"]), error)
            self.assertIn("EINVAL", str(error))
            stream = backup.streams["dev-a"]
            self.assertEqual("nbd_refused", stream.failed.code)
            stream.close()
            self.refused("incomplete", plugin, "backup.commit", {"backup": backup.id})
            self.assertEqual({"leftovers": []}, backup.abort())
        self.nothing_is_left()

    def test_somebody_cancels_our_job(self):
        with self.rig.plugin() as plugin:
            backup = self.open(plugin)
            future, go_on = self.hold(backup)
            job = next(job["id"] for job in self.rig.qmp.command("query-jobs") if job["id"].startswith("qf-"))
            self.rig.qmp.command("job-cancel", {"id": job})
            self.rig.qmp.wait_event("JOB_STATUS_CHANGE", id=job, status="concluded")
            go_on.set()
            error = future.exception(support.SECONDS)
            self.assertEqual("point_in_time_lost", error.code, error)
            stream = backup.streams["dev-a"]
            self.assertEqual("dev-a", error.data["disk"])
            # The reply tells what could not be read, which may be ahead of what was handed over.
            self.assertGreaterEqual(error.data["offset"], stream.failed.offset)
            self.assertEqual("point_in_time_lost", stream.failed.code)
            self.assertIsNone(stream.end)
            stream.close()
            again = {"backup": backup.id, "disk": "dev-a", "offset": stream.failed.offset}
            self.assertIn(
                plugin.start("backup.read", again, on_record=lambda *_: None).exception(60).code,
                ("point_in_time_lost", "offset_released"),
            )
            self.refused("incomplete", plugin, "backup.commit", {"backup": backup.id})
            self.assertEqual({"leftovers": []}, backup.abort())
            self.nothing_is_left()
            self.assertNotIn("never", self.rig.checkpoints(plugin)["dev-a"])

    def test_qemu_is_killed(self):
        notices = []
        with self.rig.plugin(on_notice=lambda method, params: notices.append((method, params))) as plugin:
            backup = self.open(plugin)
            future, go_on = self.hold(backup)
            self.rig.machine.process.kill()
            self.rig.machine.process.wait()
            go_on.set()
            error = future.exception(support.SECONDS)
            # Which of the two connections is missed first is chance.
            self.assertIn(error.code, ("point_in_time_lost", "monitor_closed"), error)
            self.assertIsNone(backup.streams["dev-a"].end)
            backup.streams["dev-a"].close()
            # What lived in QEMU is gone with it.
            backup.abort()
            self.refused("monitor_unreachable", plugin, "vm.inspect", {"monitor": self.rig.machine.qmp[1]})
        events = [params["event"] for method, params in notices if method == "vm"]
        self.assertIn("monitor_closed", events)
        self.assertEqual([], self.rig.files())

    def test_qemu_is_killed_before_commit(self):
        with self.rig.plugin() as plugin:
            backup = self.open(plugin)
            backup.read("dev-a", self.rig.image("dev-a"))
            self.rig.machine.process.kill()
            self.rig.machine.process.wait()
            data = self.refused("monitor_closed", plugin, "backup.commit", {"backup": backup.id})
            self.assertEqual("unknown", data["state_left"])
        self.assertEqual([], self.rig.files())
