"""An export's clients that want more than it, or take less than they have asked for."""

import json
import socket
import struct
import subprocess
import threading
import time
import urllib.parse

from .guest import MIB
from .nbd import DATA, READ, REQUEST, WRITE, Nbd, NbdError, OldNbd
from .exports import SOON, Machine, program

# Longest that QEMU may take to wait for all I/O, in seconds, on a machine that has other work.
DRAIN = 1
# What a client has under way: as many of QEMU's requests as it takes from one client.
READS = 16


class Clients(Machine):
    limit = 120

    def setUp(self):
        super().setUp()
        self.plugin = self.rig.plugin()
        self.addCleanup(self.plugin.close)
        self.backup = self.begin(self.plugin)
        self.exported = self.backup.call("export", disk="dev-a")

    def connect(self, kind=Nbd, export=None, **more):
        client = kind(self.exported["address"], export or self.exported["export"], **more)
        self.addCleanup(client.close)
        return client


class Elsewhere(Clients):
    """QEMU's server has many exports, and some can be written; a client reaches its own."""

    def setUp(self):
        super().setUp()
        self.backup.call("export", disk="dev-b")
        null = {"driver": "null-co", "node-name": "theirs", "size": MIB}
        self.rig.qmp.command("blockdev-add", null)
        export = {"type": "nbd", "id": "theirs", "node-name": "theirs", "name": "theirs", "writable": True}
        self.rig.qmp.command("block-export-add", export)

    def others(self):
        nodes = self.rig.qmp.command("query-named-block-nodes")
        views = [node["node-name"] for node in nodes if node["node-name"].endswith("-acc")]
        self.assertEqual(2, len(views))
        return [*views, "dev-b", "theirs", "dev", "dev-aa", "qf-", "n" * 4096]

    def unharmed(self):
        image = self.rig.image("dev-a")
        program("nbdcopy", self.exported["uri"], str(image))
        self.assert_equal_files(image, self.rig.oracle()["a"], "dev-a")
        self.rig.qmp.command("block-export-del", {"id": "theirs"})
        self.rig.qmp.wait_event("BLOCK_EXPORT_DELETED", id="theirs")
        self.assertEqual({"leftovers": []}, self.backup.abort())

    def test_other_exports(self):
        path = self.exported["address"].removeprefix("unix:")
        for name in self.others():
            with self.subTest(name[:40]):
                with self.assertRaisesRegex(NbdError, "no such export"):
                    self.connect(export=name)
                with self.assertRaises(NbdError):
                    self.connect(export=name, context="base:allocation")
                with self.assertRaises(ConnectionResetError):
                    self.connect(OldNbd, export=name)
                uri = f"nbd+unix:///{urllib.parse.quote(name)}?socket={path}"
                self.assertNotEqual(0, subprocess.run(["nbdinfo", uri], capture_output=True).returncode)
                write = ["qemu-io", "-f", "raw", "-c", "discard 0 64k", uri]
                self.assertNotEqual(0, subprocess.run(write, capture_output=True).returncode)
        self.unharmed()

    def test_the_list(self):
        found = json.loads(program("nbdinfo", "--list", "--json", self.exported["uri"]))
        self.assertEqual(["dev-a"], [each["export-name"] for each in found["exports"]])
        self.assertEqual([self.exported["size"]], [each["export-size"] for each in found["exports"]])
        said = program("qemu-nbd", "--list", "--socket", self.exported["address"].removeprefix("unix:"))
        self.assertIn("exports available: 1", said)
        self.assertIn("export: 'dev-a'", said)
        self.unharmed()

    def test_the_default_export(self):
        """There is one, so it needs no name."""
        uri = self.exported["uri"].replace("///dev-a?", "///?")
        self.assertNotEqual(uri, self.exported["uri"])
        self.assertEqual(f"{self.exported['size']}\n", program("nbdinfo", "--size", uri))
        image = self.rig.image("dev-a.default")
        program("nbdcopy", uri, str(image))
        self.assert_equal_files(image, self.rig.oracle()["a"], "dev-a")
        with OldNbd(self.exported["address"], "") as client:
            self.assertEqual(self.exported["size"], client.size)
        self.unharmed()

    def test_old_clients(self):
        for flags in (1, 3, 0):
            with self.subTest(flags):
                client = self.connect(OldNbd, flags=flags)
                self.assertEqual(self.exported["size"], client.size)
                at = 3 * MIB + 512
                found = b"".join(client.read(start, min(at, client.size - start)) for start in range(0, client.size, at))
                with open(self.rig.oracle()["a"], "rb") as copy:
                    self.assertEqual(copy.read(), found)
        self.unharmed()


class Slow(Clients):
    """QEMU waits for no client, whenever it has to wait for all I/O."""

    def setUp(self):
        super().setUp()
        # Once for what was written before, which is none of a client's.
        for command in ("cont", "stop"):
            self.rig.qmp.command(command)

    def drains(self):
        """`stop` and `cont` wait for all I/O: the longest time that one took."""
        longest = 0
        for command in ("cont", "stop"):
            began = time.monotonic()
            self.rig.qmp.command(command)
            longest = max(longest, time.monotonic() - began)
        self.assertLess(longest, DRAIN)
        return longest

    def ask(self, client):
        for number in range(READS):
            client.send(READ, number % 8 * MIB, MIB, cookie=number)

    def begins(self, client):
        """The first answer is on its way."""
        client.socket.recv(1, socket.MSG_PEEK)

    def answer(self, client):
        pieces = [data[8:] for kind, data in client.answer() if kind == DATA]
        self.assertEqual(b"\1" * MIB, b"".join(pieces))

    def test_a_client_that_takes_little(self):
        client = self.connect()
        self.ask(client)
        failed = []

        def take():
            try:
                for _ in range(READS):
                    time.sleep(0.3)  # It is that slow.
                    self.answer(client)
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        found = []
        while thread.is_alive():
            found.append(self.drains())
            time.sleep(0.05)
        self.assertEqual([], failed)
        self.assertGreater(len(found), 1)
        self.assertEqual({"leftovers": []}, self.backup.abort())

    def test_clients_that_take_nothing(self):
        clients = [self.connect() for _ in range(5)]
        for client in clients:
            self.ask(client)
            self.begins(client)
        self.drains()
        # They are late, and have all their answers.
        for _ in range(READS):
            self.answer(clients[0])
        self.drains()
        began = time.monotonic()
        self.assertEqual({"leftovers": []}, self.backup.abort())
        self.assertLess(time.monotonic() - began, SOON)
        for client in clients:
            client.ends()

    def test_clients_in_the_middle_of_a_request(self):
        header = struct.pack(">IHHQQI", REQUEST, 0, WRITE, 1, 0, MIB)
        for said in (header[:1], header[:27], header, header + bytes(MIB - 1)):
            with self.subTest(len(said)):
                client = self.connect()
                client.read(0, 512)
                client.socket.sendall(said)
                # What it has said so far has arrived: another one's is answered.
                self.connect().read(0, 512)
                self.drains()
        # The last one goes on.
        client.socket.sendall(b"\0")
        with self.assertRaises(NbdError):
            client.answer()
        self.assertEqual(b"\1" * 512, client.read(0, 512))
        self.assertEqual({"leftovers": []}, self.backup.abort())

    def test_more_than_there_is_room_for(self):
        """The longest reads that there are, all at once."""
        client = self.connect()
        for number in range(4):
            client.send(READ, 0, 16 * MIB, cookie=number)
        self.begins(client)
        self.drains()
        for _ in range(4):
            pieces = [data[8:] for kind, data in client.answer() if kind == DATA]
            self.assertEqual(b"\1" * 8 * MIB, b"".join(pieces)[: 8 * MIB])
        self.assertEqual({"leftovers": []}, self.backup.abort())
