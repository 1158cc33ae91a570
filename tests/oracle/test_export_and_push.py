"""A disk that is pushed and exported, pulled and exported, and acknowledged meanwhile."""

from . import support
from .guest import MIB
from .life import SIZE
from .nbd import Nbd, NbdError, copy
from .pushes import SOON, Pushes
from .support import Backup


class Together(Pushes):
    def refused_at_once(self, code, backup, method, state="backup_open", **params):
        """A request is refused while a push goes on, and not after it."""
        params = {"backup": backup.id, "disk": "dev-a", **params}
        data = self.within(SOON, self.refused, code, backup.plugin, f"backup.{method}", params)
        self.assertEqual(state, data["state_left"])

    def whole(self, export):
        """All of an exported disk can be read, and is right."""
        self.assertEqual("all", export["readable"])
        with Nbd(export["address"], export["export"]) as client:
            image = self.places.folder / "read.raw"
            copy(client, [(0, client.size)], image)
        self.equal(image)

    def held(self, backup, server, **params):
        """A push of which some has been written, and that does not go on before its server does."""
        future = self.start(backup, server, timeout_ms=1000 * support.SECONDS, **params)
        server.suspend()
        self.assertFalse(future.done(), "the push was over")
        return future

    def test_an_export_during_a_push(self):
        """It is refused: the push may last for hours, and gives back what it has written."""
        with self.backed_up() as backup:
            server = self.slow()
            future = self.held(backup, server)
            for _ in range(3):
                self.refused_at_once("stream_active", backup, "export", "disk_spent")
            server.resume()
            future.result(support.SECONDS)
            self.equal(server.image)
            self.refused_at_once("offset_released", backup, "export", "disk_spent")

    def test_an_export_and_a_push_at_once(self):
        """Whichever is first: what is exported can be read, also when the push is over."""
        for number in range(6):
            with self.subTest(number), self.opened() as backup:
                target = {"kind": "file", "path": str(self.targets / f"{number}.raw"), "format": "raw"}
                params = {"backup": backup.id, "disk": "dev-a"}
                calls = [
                    lambda: self.push(backup, target),
                    lambda: backup.plugin.start("backup.export", params),
                ]
                if number % 2:
                    pushed, exported = (call() for call in calls)
                else:
                    exported, pushed = (call() for call in reversed(calls))
                pushed.result(support.SECONDS)
                self.equal(target["path"])
                error = exported.exception(support.SECONDS)
                if error is None:
                    self.whole(exported.result())
                else:
                    self.assertIn(error.code, ("stream_active", "offset_released"))

    def test_a_push_of_an_exported_disk(self):
        """Its readers keep all of it, and it is not given back under the push."""
        with self.backed_up() as backup:
            export = backup.call("export", disk="dev-a")
            server = self.slow()
            future = self.held(backup, server)
            self.assertEqual(export, self.within(SOON, lambda: backup.call("export", disk="dev-a")))
            self.refused_at_once("stream_active", backup, "ack", offset=SIZE)
            self.whole(export)
            server.resume()
            future.result(support.SECONDS)
            self.equal(server.image)
            self.whole(export)
            self.assertEqual(SIZE, backup.call("ack", disk="dev-a", offset=SIZE)["resume"])
            with Nbd(export["address"], export["export"]) as client, self.assertRaises(NbdError):
                client.read(0, 512)

    def test_a_push_of_a_disk_that_was_read(self):
        """What the host has of a stream is not given back under a push."""
        with self.backed_up() as backup:
            digest = backup.read("dev-a", self.rig.image("dev-a"), release="on_ack")["digest"]
            server = self.slow()
            future = self.held(backup, server, discard_source=False)
            self.refused_at_once("stream_active", backup, "ack", offset=SIZE)
            server.resume()
            future.result(support.SECONDS)
            self.equal(server.image)
            # What was refused has changed nothing.
            self.assertEqual(8 * MIB, backup.call("ack", disk="dev-a", offset=8 * MIB)["resume"])
            params = {"backup": backup.id, "disk": "dev-a", "offset": 8 * MIB}
            again = backup.plugin.start("backup.read", params, on_record=lambda *_: None)
            self.assertEqual(digest, again.result(support.SECONDS)["digest"])

    def test_a_stream_of_an_exported_disk(self):
        """Others read what it has read; and it goes on whatever they have read."""
        with self.opened() as backup:
            export = backup.call("export", disk="dev-a")
            refused = []

            def ack(record):
                if not refused and record["kind"] == "data":
                    refused.append(backup.plugin.start("backup.ack", {
                        "backup": backup.id, "disk": "dev-a", "offset": SIZE}))

            future = backup.start("dev-a", self.rig.image("dev-a"), on_record=ack)
            future.result(support.SECONDS)
            backup.streams["dev-a"].finish()
            self.equal(self.rig.image("dev-a"))
            # It came in time, or when the stream was over.
            error = refused[0].exception(support.SECONDS)
            if error is not None:
                self.assertEqual("stream_active", error.code)
                self.whole(export)
