"""The proxy against a real QEMU: two independent views of one instant must be equal.

    python3 -m unittest discover -s tests/oracle -t tests
"""

import json
import os
import pathlib
import socket
import subprocess
import tempfile
import unittest

from .guest import MIB, Disk, Guest, pattern
from .proxy import Proxy
from .qmp import Qmp, QmpError
from .targets import until


class PointInTime:
    """The session of a backup plugin: a job's filter and a snapshot-access node per disk."""

    def __init__(self, qmp, folder, nodes, sizes):
        self.qmp = qmp
        self.folder = folder
        self.nodes = nodes
        self.socket = f"{folder}/nbd.sock"
        for node, size in zip(nodes, sizes):
            self._add_scratch(node, size)
        actions = [
            {
                "type": "blockdev-backup",
                "data": {
                    "job-id": f"bk-{node}",
                    "device": node,
                    "target": f"bk-{node}-s",
                    "sync": "none",
                    "filter-node-name": f"bk-{node}-cbw",
                    "auto-dismiss": False,
                },
            }
            for node in nodes
        ]
        # Something after the backups: the copies must come in between.
        actions += [
            {
                "type": "block-dirty-bitmap-add",
                "data": {"node": node, "name": "bk-new", "persistent": False},
            }
            for node in nodes
        ]
        qmp.command("transaction", {"actions": actions})
        address = {"type": "unix", "data": {"path": self.socket}}
        qmp.command("nbd-server-start", {"addr": address})
        for node in nodes:
            access = {"driver": "snapshot-access", "node-name": f"bk-{node}-acc"}
            qmp.command("blockdev-add", {**access, "file": f"bk-{node}-cbw"})
            export = {"type": "nbd", "id": f"bk-{node}", "name": node}
            qmp.command("block-export-add", {**export, "node-name": f"bk-{node}-acc"})

    def _add_scratch(self, node, size):
        path = f"{self.folder}/scratch"
        create = ["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)]
        subprocess.run(create, check=True)
        fd = os.open(path, os.O_RDWR)
        os.unlink(path)
        number = self.qmp.command("add-fd", {"opaque": f"bk-{node}"}, fd=fd)["fdset-id"]
        os.close(fd)
        file = {"driver": "file", "filename": f"/dev/fdset/{number}"}
        scratch = {"driver": "qcow2", "node-name": f"bk-{node}-s", "file": file}
        self.qmp.command("blockdev-add", scratch)
        self.qmp.command("remove-fd", {"fdset-id": number})

    def read(self, node, path):
        url = f"nbd+unix:///{node}?socket={self.socket}"
        subprocess.run(["nbdcopy", url, path], check=True)

    def end(self):
        for node in self.nodes:
            self.qmp.command("block-export-del", {"id": f"bk-{node}", "mode": "hard"})
            self.qmp.wait_event("BLOCK_EXPORT_DELETED", id=f"bk-{node}")
        self.qmp.command("nbd-server-stop")
        for node in self.nodes:
            self.qmp.command("blockdev-del", {"node-name": f"bk-{node}-acc"})
            self.qmp.command("job-cancel", {"id": f"bk-{node}"})
            self.qmp.wait_event("JOB_STATUS_CHANGE", id=f"bk-{node}", status="concluded")
            self.qmp.command("job-dismiss", {"id": f"bk-{node}"})
            self.qmp.command("blockdev-del", {"node-name": f"bk-{node}-s"})
            self.qmp.command("block-dirty-bitmap-remove", {"node": node, "name": "bk-new"})


class ProxyTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="fleece-oracle-")
        self.addCleanup(lambda: subprocess.run(["rm", "-r", self.folder], check=True))
        self.disks = [Disk(size=48 * MIB), Disk(size=32 * MIB, format="raw", iothread=True)]
        self.guest = Guest(self.disks)
        self.addCleanup(self.guest.close)
        self.listen = f"{self.folder}/qmp"
        self.images = pathlib.Path(self.folder, "images")
        self.proxy = Proxy(self.listen, *self.guest.qmp[:2], self.images)
        self.addCleanup(self.proxy.close)

    def test_both_views_are_equal_while_the_guest_writes(self):
        nodes = ["disk0", "disk1"]
        for node in nodes:
            self.guest.run(f"write {node} 0 16M 7")
            self.guest.run(f"start {node} {node} from=64K zero=10 discard=10")
        self.guest.run("count both disk0 disk1")
        for number in range(1, 6):
            with Qmp(self.listen) as qmp:  # as each plugin's process does
                point = PointInTime(qmp, self.folder, nodes, [disk.size for disk in self.disks])
                written = self.writes()
                until(lambda: self.writes() > written)
                result = self.proxy.wait(number)
                self.assertEqual({}, result["errors"])
                self.assertTrue((self.images / str(number) / "done").exists())
                counts = []
                for node in nodes:
                    point.read(node, f"{self.folder}/view")
                    view = pathlib.Path(self.folder, "view").read_bytes()
                    oracle = pathlib.Path(result["images"][node]).read_bytes()
                    self.assertEqual(len(view), len(oracle))
                    self.assertTrue(view == oracle, f"round {number}: {node} differs")
                    counts.append(int.from_bytes(oracle[:8], "little"))
                point.end()
            self.assertIn(counts[0] - counts[1], (0, 1), "the disks are not of one instant")
        self.assert_nothing_left()

    def writes(self):
        return self.guest.stat("stat disk0")["writes"]

    def test_a_copy_holds_what_the_guest_wrote_before(self):
        self.guest.run("write disk1 1M 64K 5")
        with Qmp(self.listen) as qmp:
            point = PointInTime(qmp, self.folder, ["disk1"], [self.disks[1].size])
            self.guest.run("write disk1 1M 64K 6")
            image = pathlib.Path(self.proxy.wait(1)["images"]["disk1"]).read_bytes()
            point.end()
        self.assertEqual(pattern(5, MIB, 65536), image[MIB : MIB + 65536])

    def test_a_refused_transaction_leaves_nothing(self):
        with Qmp(self.listen) as qmp:
            for unknown in ("nothing", "#block1"):
                with self.assertRaises(QmpError):
                    # Refused by its last action, when the copies have begun.
                    backup = {"device": "disk0", "target": "disk1", "sync": "none"}
                    bitmap = {"node": unknown, "name": "x"}
                    actions = [
                        {"type": "blockdev-backup", "data": {"job-id": "bk", **backup}},
                        {"type": "block-dirty-bitmap-add", "data": bitmap},
                    ]
                    qmp.command("transaction", {"actions": actions})
        self.assertIsNone(self.proxy.wait(1))
        self.assertIsNone(self.proxy.wait(2))
        self.assert_nothing_left()

    def test_every_other_line_passes_unchanged(self):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.listen)
            lines = client.makefile("rb")
            self.assertIn("QMP", json.loads(lines.readline()))
            # Two commands at once, a broken one, and none with an id.
            client.sendall(b'{"execute":"qmp_capabilities"}\n{"execute":"query-name"}\n{]\n')
            self.assertEqual(b'{"return": {}}\r\n', lines.readline())
            self.assertEqual(b'{"return": {}}\r\n', lines.readline())
            self.assertIn("error", json.loads(lines.readline()))
            # A transaction without a point in time, and one that is not well-formed.
            client.sendall(b'{"execute":"transaction","arguments":{"actions":[]},"id":[1]}\n')
            self.assertEqual(b'{"return": {}, "id": [1]}\r\n', lines.readline())
            client.sendall(b'{"execute":"transaction","arguments":{"actions":3},"id":"x"}\n')
            self.assertEqual("x", json.loads(lines.readline())["id"])
            lines.close()

    def test_a_copy_outlives_its_client(self):
        with Qmp(self.listen) as qmp:
            PointInTime(qmp, self.folder, ["disk0"], [self.disks[0].size])
        self.assertEqual({}, self.proxy.wait(1)["errors"])

    def assert_nothing_left(self):
        with Qmp(self.listen) as qmp:
            nodes = [node["node-name"] for node in qmp.command("query-named-block-nodes")]
            self.assertEqual([], qmp.command("query-jobs"))
        self.assertEqual([], [node for node in nodes if node.startswith(("oracle-", "bk-"))])


if __name__ == "__main__":
    unittest.main()
