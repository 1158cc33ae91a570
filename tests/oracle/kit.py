"""What the tests of the plugin share: the binary, streams applied to images, looks for leftovers."""

import os
import pathlib
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "integrations/python"))

from fleece_host.plugin import Plugin, PluginError, PluginGone  # noqa: E402,F401
from fleece_host.stream import Checker  # noqa: E402

from .guest import RIG  # noqa: E402
from .qmp import Qmp  # noqa: E402

PLUGIN = os.environ.get("QEMU_FLEECE", str(ROOT / "target/debug/qemu-fleece"))
OLD = str(RIG / "qemu-7.2/qemu-system-x86_64")
SECONDS = 120


class Case(unittest.TestCase):
    """A test with a folder of its own, where the plugin keeps its files."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="fleece-test-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.places = self.folder / "places"
        self.places.mkdir()

    def plugin(self, carrier="framed", **more):
        command = [PLUGIN, "--scratch-dir", str(self.places), "--runtime-dir", str(self.places)]
        plugin = Plugin(command, carrier=carrier, **more)
        self.addCleanup(plugin.close)
        return plugin

    def refused(self, code, plugin, method, **params):
        """Asks for what must fail with `code`; the error's data."""
        with self.assertRaises(PluginError) as caught:
            plugin.call(method, params, SECONDS)
        self.assertEqual(caught.exception.data["code"], code, caught.exception)
        return caught.exception.data

    def assert_clean(self, qmp):
        """Nothing of any session is in QEMU, nor in the plugin's folders."""
        self.assertEqual(ours(qmp), [])
        self.assertEqual(os.listdir(self.places), [])


def ours(qmp):
    """Temporary objects of the plugin in QEMU."""
    nodes = qmp.command("query-named-block-nodes", {"flat": True})
    names = [node.get("node-name", "") for node in nodes]
    names += [bitmap.get("name", "") for node in nodes for bitmap in node.get("dirty-bitmaps", [])]
    names += [job["id"] for job in qmp.command("query-jobs")]
    names += [export["id"] for export in qmp.command("query-block-exports")]
    return [name for name in names if name.startswith("qf-")]


def bitmaps(qmp, node):
    """Names of the bitmaps of a node."""
    return [bitmap.get("name", "") for other in qmp.command("query-named-block-nodes", {"flat": True})
            if other.get("node-name") == node for bitmap in other.get("dirty-bitmaps", [])]


class Pull:
    """One `backup.read`, checked as it comes, and applied to `image` (a bytearray)."""

    def __init__(self, plugin, backup, disk, image, on_record=None, **more):
        self.image, self.records, self.checker = image, [], Checker()
        self._also = on_record or (lambda record: None)
        self.future = plugin.start("backup.read", {"backup": backup, "disk": disk, **more}, on_record=self._take)

    def _take(self, record, payload):
        self.records.append(record)
        self._also(record)
        if record["kind"] == "failed":
            return
        self.checker.take(record, payload)
        kind, offset, length = record["kind"], record.get("offset", 0), record.get("length", 0)
        if kind == "begin" and not self.image:
            self.image.extend(bytes(record["size"]))
        elif kind == "data":
            self.image[offset:offset + length] = payload
        elif kind == "zero":
            self.image[offset:offset + length] = bytes(length)

    def result(self):
        result = self.future.result(SECONDS)
        self.checker.finish()
        return result

    def kinds(self):
        return {record["kind"] for record in self.records}

    def covers(self, kind, start, end):
        """Whether records of that kind cover the range."""
        covered = start
        for record in self.records:
            if record["kind"] == kind and record["offset"] <= covered < record["offset"] + record["length"]:
                covered = record["offset"] + record["length"]
        return covered >= end
