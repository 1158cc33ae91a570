"""Push targets that misbehave in the middle: each error is told, and costs the VM nothing."""

import os
import time

from . import support
from .guest import MIB
from .life import BASE, SIZE
from .pushes import SOME, SOON, TIMEOUT, Pushes
from .support import QEMU_7_2, QEMU_NEW, Backup, Wire
from .targets import scripts, until


# How long a target is borne where it has to be told from what comes at once, in ms.
HUNG = 5000


class Faults(Pushes):
    # --- full -------------------------------------------------------------------------

    def test_a_server_without_room(self):
        server = self.nbdkit(plugin=["full", str(SIZE)])
        with self.doomed() as backup:
            self.fails("target_unwritable", backup, server.target())

    def test_a_server_whose_room_ends(self):
        trigger = self.places.folder / "trigger"
        full = [f"error-{one}={value}" for one, value in (("pwrite", "ENOSPC"), ("pwrite-rate", "100%"))]
        server = self.slow(*full, f"error-pwrite-file={trigger}", filters=["error"])
        with self.doomed() as backup:
            future = self.start(backup, server)
            trigger.touch()
            self.failed("target_unwritable", future)

    def test_a_servers_file_system_is_full(self):
        image = self.tmpfs("4M") / "target"
        image.touch()
        os.truncate(image, SIZE)
        server = self.nbdkit(image=image)
        with self.doomed() as backup:
            self.fails("target_unwritable", backup, server.target())

    def test_a_file_system_is_full(self):
        folder = self.tmpfs("4M")
        old = folder / "old"
        old.touch()
        os.truncate(old, SIZE)
        targets = [{"kind": "file", "path": f"{folder}/new", "format": format} for format in ("raw", "qcow2")]
        targets += [{"kind": "existing", "path": str(old), "format": "raw"}]
        for target in targets:
            with self.subTest(**target), self.doomed() as backup:
                self.fails("target_unwritable", backup, target)
                self.assertEqual(["old"], os.listdir(folder))

    def test_other_errors(self):
        trigger = self.places.folder / "trigger"
        for number, code in enumerate(("EIO", "EPERM", "EINVAL", "ESHUTDOWN")):
            trigger.unlink(missing_ok=True)
            parameters = [f"error={code}", "error-pwrite-rate=100%", f"error-file={trigger}"]
            server = self.slow(*parameters, filters=["error"], image=self.raw(f"target{number}"))
            with self.subTest(code), self.doomed() as backup:
                future = self.start(backup, server)
                trigger.touch()
                self.failed("target_failed", future)
            server.close()

    # --- slow -------------------------------------------------------------------------

    def test_slow_is_not_hung(self):
        """Each write takes half of `timeout_ms`, and all of them much more."""
        server = self.slow(delay="3000ms", image=self.raw(like=self.base_image))
        # The older QEMU writes cluster by cluster.
        workers = 32 if self.qemu == QEMU_7_2 else 3
        with self.backed_up(BASE) as backup:
            began = time.monotonic()
            future = self.push(backup, server.target(), timeout_ms=6000, workers=workers)
            self.monitor_answers_until(future, 2)
            self.assertGreater(time.monotonic() - began, 6)
            future.result()
            self.equal(server.image)

    def test_a_pause_is_not_hung(self):
        server = self.slow()
        with self.backed_up() as backup:
            future = self.start(backup, server, timeout_ms=30000)
            server.suspend()
            time.sleep(TIMEOUT / 1000)
            self.assertFalse(future.done())
            server.resume()
            future.result(support.SECONDS)
            self.equal(server.image)

    # --- hung -------------------------------------------------------------------------

    def hang(self, tcp, base=None):
        image = self.raw(like=self.base_image) if base else None
        server = self.slow(tcp=tcp, image=image)
        with self.doomed(base) as backup:
            future = self.start(backup, server, timeout_ms=HUNG)
            began = time.monotonic()
            server.suspend()
            # The guest does not wait for it.
            self.within(HUNG / 2000, self.write, "write -P 9 12M 64K")
            actions = [{"type": "block-dirty-bitmap-add", "data": {"node": "a", "name": "theirs"}}]
            # Waits for all I/O first: until the target is cut off.
            self.rig.qmp.command("transaction", {"actions": actions})
            self.assertLess(time.monotonic() - began, HUNG / 1000 + SOON)
            self.failed("target_timeout", future)
            took = time.monotonic() - began
            self.assertGreater(took, HUNG / 1000 / 2)
            self.assertLess(took, HUNG / 1000 + SOON)
            self.answers()
            self.rig.qmp.command("block-dirty-bitmap-remove", {"node": "a", "name": "theirs"})

    def test_hung_on_a_unix_socket(self):
        self.hang(tcp=False)

    def test_hung_on_tcp(self):
        self.hang(tcp=True, base=BASE)

    def test_hung_and_stopped(self):
        """`stop` waits for all I/O, and must not wait longer than the target is borne."""
        server = self.slow()
        with self.doomed() as backup:
            future = self.start(backup, server)
            server.suspend()
            self.within(TIMEOUT / 1000 + SOON, self.rig.qmp.command, "stop")
            self.failed("target_timeout", future)
            self.answers()

    def test_hung_and_stopped_in_an_attached_backup(self):
        """Only QEMU knows how much scratch there is then, and it does not answer."""
        wire = Wire(self.rig.command())
        self.addCleanup(wire.close)
        begun = wire.call("backup.begin", {"monitor": self.rig.monitor, "keep_ms": 600_000})
        wire.process.kill()
        wire.close()
        server = self.slow()
        with self.rig.plugin() as plugin:
            params = {"monitor": self.rig.monitor, "backup": begun["backup"]}
            backup = Backup.of(plugin, plugin.call("backup.attach", params, support.SECONDS))
            future = self.start(backup, server)
            server.suspend()
            self.within(TIMEOUT / 1000 + SOON, self.rig.qmp.command, "stop")
            self.failed("target_timeout", future)
            self.answers()
            self.assertEqual({"leftovers": []}, backup.abort())
        self.unharmed()

    def test_hung_at_the_flush(self):
        image = self.raw()
        server = self.nbdkit(plugin=scripts(image, flush="exec sleep 100"), image=image)
        with self.doomed() as backup:
            future = self.push(backup, server.target(), timeout_ms=TIMEOUT)
            until(lambda: any(each.name == "Flush" for each in server.requests()) or future.done())
            began = time.monotonic()
            self.failed("target_timeout", future)
            self.assertLess(time.monotonic() - began, TIMEOUT / 1000 + SOON)
            self.answers()

    def test_hung_at_its_end(self):
        """What a server does after its last flush is nobody's business."""
        server = self.nbdkit("delay-close=60", filters=["delay"])
        with self.backed_up() as backup:
            self.within(3 * SOON, self.pushed, backup, server.target())
            self.answers()
            self.equal(server.image)

    # --- dead -------------------------------------------------------------------------

    def test_killed(self):
        for number, tcp in enumerate((False, True)):
            server = self.slow(tcp=tcp, image=self.raw(f"target{number}"))
            with self.subTest(tcp=tcp), self.doomed() as backup:
                future = self.start(backup, server)
                server.kill()
                self.failed("target_failed", future)
                self.answers()

    def test_dead_before_the_flush(self):
        """What was written may be lost: no success."""
        ways = {"fails": "echo EIO no >&2; exit 1", "full": "echo ENOSPC no >&2; exit 1", "kills": "kill -9 $PPID"}
        for way, flush in ways.items():
            image = self.raw(way)
            server = self.nbdkit(plugin=scripts(image, flush=flush), image=image)
            with self.subTest(way), self.doomed() as backup:
                self.fails("target_unwritable" if way == "full" else "target_failed", backup, server.target())

    def test_success_is_on_stable_storage(self):
        server = self.slow(delay="1ms")
        with self.backed_up() as backup:
            self.pushed(backup, server.target())
            self.assertTrue(server.changes())
            self.assertTrue(server.flushed(), "no flush after the last write")
            self.equal(server.image)

    def test_another_try(self):
        """What was not discarded can be pushed again, elsewhere; what was is told to be spent."""
        good = self.nbdkit(image=self.raw("good"))
        # None: where QEMU can.
        for discard in (False, None):
            gone = discard is None and self.qemu != QEMU_7_2
            server = self.slow(image=self.raw(f"bad{discard}"))
            with self.subTest(discard=discard), self.doomed() if gone else self.opened() as backup:
                future = self.start(backup, server, discard_source=discard)
                server.kill()
                left = self.failed("target_failed", future).data["state_left"]
                self.assertEqual("disk_spent" if gone else "backup_open", left)
                if gone:
                    self.fails("offset_released", backup, good.target())
                    data = self.refused("offset_released", backup.plugin, "backup.read",
                                        {"backup": backup.id, "disk": "dev-a"})
                    self.assertEqual("disk_spent", data["state_left"])
                else:
                    self.pushed(backup, good.target())
                    self.equal(good.image)

    def test_qemu_is_killed(self):
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, checkpoint="never")
            target = {"kind": "file", "path": f"{self.targets}/new", "format": "qcow2"}
            future = self.push(backup, target, speed=MIB)
            until(lambda: self.listing() or future.done())
            self.kill()
            error = future.exception(support.SECONDS)
            # Which of the two is missed first is chance.
            self.assertIn(error.code, ("monitor_closed", "point_in_time_lost"), error)
            backup.abort()
        self.assertEqual([], self.listing())
        self.assertEqual([], self.rig.files())

    def test_qemu_is_killed_while_it_flushes(self):
        """Which is no fault of the target's."""
        image = self.raw()
        server = self.nbdkit(plugin=scripts(image, flush="exec sleep 100"), image=image)
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, checkpoint="never")
            future = self.push(backup, server.target(), timeout_ms=60000)
            until(lambda: any(each.name == "Flush" for each in server.requests()) or future.done())
            self.kill()
            error = future.exception(support.SECONDS)
            self.assertIn(error.code, ("monitor_closed", "point_in_time_lost"), error)
            backup.abort()
        self.assertEqual([], self.rig.files())

    # --- no more wanted ---------------------------------------------------------------

    def cancel(self, backup, future, request):
        began = time.monotonic()
        self.assertEqual({"found": True}, backup.plugin.call("cancel", {"id": request}, support.SECONDS))
        self.failed("cancelled", future)
        self.assertLess(time.monotonic() - began, SOON)

    def test_cancel(self):
        for hung in (False, True):
            server = self.slow(delay="500ms", image=self.raw(f"target{hung}"))
            with self.subTest(hung=hung), self.doomed() as backup:
                request = backup.plugin._next_id
                future = self.start(backup, server, workers=1, timeout_ms=60000)
                if hung:
                    server.suspend()
                self.cancel(backup, future, request)
                self.answers()

    def test_cancel_of_records(self):
        for discard in (False, None):
            with self.subTest(discard=discard), self.doomed() as backup:
                request = backup.plugin._next_id
                future = self.push(backup, {"kind": "records"}, speed=MIB, discard_source=discard)
                until(lambda: self.copied() or future.done())
                self.cancel(backup, future, request)
                self.assertEqual(discard is None and self.qemu != QEMU_7_2, self.spent)

    def test_cancel_of_a_new_file(self):
        path = self.targets / "new"
        for format in ("raw", "qcow2"):
            with self.subTest(format), self.doomed() as backup:
                request = backup.plugin._next_id
                future = self.push(backup, {"kind": "file", "path": str(path), "format": format}, speed=MIB)
                until(lambda: self.listing() or future.done())
                self.assertFalse(path.exists(), "it is there, and not complete")
                self.cancel(backup, future, request)
                self.assertEqual([], self.listing())

    def test_abort_while_the_target_hangs(self):
        server = self.slow()
        with self.rig.plugin() as plugin:
            backup = Backup(plugin, self.rig.monitor, checkpoint="never")
            future = self.start(backup, server, timeout_ms=60000)
            server.suspend()
            self.assertEqual({"leftovers": []}, self.within(SOON, backup.abort))
            self.assertEqual("cancelled", future.exception(SOON).code)
        self.unharmed()

    # --- the host is gone -------------------------------------------------------------

    def pushing(self, hung):
        """A plugin in the middle of a push, by its wire."""
        server = self.slow(delay="300ms", image=self.raw(f"target{hung}"))
        wire = Wire(self.rig.command())
        self.addCleanup(wire.close)
        params = {"monitor": self.rig.monitor, "base": None, "checkpoint": "never"}
        backup = wire.call("backup.begin", params)["backup"]
        more = {"workers": 1, "timeout_ms": 60000}
        wire.send("backup.push", {"backup": backup, "disk": "dev-a", "target": server.target(), **more})
        server.wait_changes(SOME)
        if hung:
            server.suspend()
        return wire

    def test_standard_input_ends(self):
        for hung in (False, True):
            with self.subTest(hung=hung):
                wire = self.pushing(hung)
                wire.process.stdin.close()
                self.answers()
                self.assertEqual(3, self.within(2 * SOON, wire.wait))
                self.unharmed()

    def test_the_plugin_is_killed(self):
        """What it leaves in QEMU costs neither guest nor base; a restart ends it."""
        for hung in (False, True):
            with self.subTest(hung=hung):
                wire = self.pushing(hung)
                wire.process.kill()
                wire.close()
                self.answers()
                self.within(SOON, self.write, "write -P 9 12M 64K")
                self.assertEqual({"dev-a": "usable"}, self.health())
                self.within(2 * SOON, self.quit)
                self.boot()
                self.assertEqual([], self.left())
                self.write("write -P 10 13M 64K")
                self.next_is({"dev-a": None}, ids=True)


class FaultsIn72(Faults):
    qemu = QEMU_7_2

    def test_discard_source(self):
        """Which this QEMU does not know: all is there still."""
        with self.opened() as backup:
            target = self.existing(self.raw())
            self.fails("qemu_unsupported", backup, target, discard_source=True)
            self.pushed(backup, target)
            self.equal(target["path"])


class KilledInNew(Pushes):
    """With io_uring, what a dead QEMU had open is open for a while."""

    qemu = QEMU_NEW
    test_qemu_is_killed = Faults.test_qemu_is_killed
