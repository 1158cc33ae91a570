"""Replays the transcripts of protocol/examples against the real plugin and a real QEMU.

A line that starts with `> ` is what the host sends, one with `< ` what the plugin answers.
What no two runs share (ids, times, versions, messages) is only held to be of the same type,
and an id to stand for one thing; text that ends with `...` is a beginning. `! ` is a
command of qemu-io on the disk, as the guest's write; `# ` is a comment. `progress` may
come at any time and is passed over. `$DIR` stands for a folder of the test.
"""

import json
import os
import pathlib
import subprocess
import tempfile
import unittest

from .machines import Vm, io, make_image, virtio
from .qmp import Qmp

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "protocol/examples"
PLUGIN = os.environ.get("QEMU_FLEECE", str(ROOT / "target/debug/qemu-fleece"))
VOLATILE = {"time_ms", "duration_ms", "scratch_peak", "version", "qemu_version", "message", "our_objects", "free_bytes"}
IDS = {"backup", "restore", "checkpoint_id", "base_id", "id"}
DEVICE = "/machine/peripheral/disk0/virtio-backend"


class Replay:
    def __init__(self, folder, qmp):
        self.folder, self.qmp, self.ids = folder, qmp, {}
        scratch = pathlib.Path(folder) / "scratch"
        scratch.mkdir(exist_ok=True)
        self.plugin = subprocess.Popen(
            [PLUGIN, "--scratch-dir", scratch, "--runtime-dir", folder],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def line(self, text):
        mark, rest = text[:2], text[2:].replace("$DIR", str(self.folder))
        if mark == "> ":
            for known, actual in self.ids.items():
                rest = rest.replace(f'"{known}"', f'"{actual}"')
            self.plugin.stdin.write(rest + "\n")
        elif mark == "! ":
            io(self.qmp, DEVICE, rest)
        elif mark == "< ":
            actual = self.answer()
            self.match(json.loads(rest), actual, "")
        elif mark != "# ":
            raise AssertionError(f"no line of a transcript: {text}")

    def answer(self):
        while True:
            line = self.plugin.stdout.readline()
            if not line:
                raise AssertionError("the plugin ended")
            answer = json.loads(line)
            if answer.get("method") != "progress":
                return answer

    def match(self, expected, actual, path):
        where = path or "line"
        key = path.rsplit(".", 1)[-1]
        if isinstance(expected, dict) and isinstance(actual, dict):
            if set(expected) != set(actual):
                raise AssertionError(f"{where}: {sorted(expected)} in the transcript, and now {actual}")
            for name in expected:
                self.match(expected[name], actual[name], f"{path}.{name}")
        elif isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
            for index, (one, other) in enumerate(zip(expected, actual)):
                self.match(one, other, f"{path}[{index}]")
        elif key in IDS and isinstance(actual, str):
            if self.ids.setdefault(expected, actual) != actual:
                raise AssertionError(f"{where}: another id: {actual}")
        elif key in VOLATILE and isinstance(expected, type(actual)):
            pass
        elif isinstance(expected, str) and expected.endswith("...") and isinstance(actual, str):
            if not actual.startswith(expected[:-3]):
                raise AssertionError(f"{where}: {actual[:80]} does not start with {expected}")
        elif expected != actual:
            raise AssertionError(f"{where}: {expected!r} in the transcript, and now {actual!r}")

    def close(self):
        self.plugin.stdin.close()
        self.plugin.wait(60)
        self.plugin.stdout.close()


class Transcripts(unittest.TestCase):
    def test_each_is_what_happens(self):
        names = sorted(EXAMPLES.glob("*.jsonl"))
        self.assertTrue(names)
        for name in names:
            with self.subTest(name.name), tempfile.TemporaryDirectory() as folder:
                folder = pathlib.Path(folder)
                make_image(folder / "disk0.qcow2", size="192K")
                with Vm(virtio("node0", folder / "disk0.qcow2", device="disk0")) as vm, Qmp(vm.qmp[1]) as qmp:
                    os.symlink(vm.qmp[0], folder / "qmp.sock")
                    replay = Replay(folder, qmp)
                    try:
                        for number, text in enumerate(name.read_text().splitlines(), 1):
                            try:
                                replay.line(text)
                            except AssertionError as error:
                                raise AssertionError(f"{name.name}:{number}: {error}") from None
                    finally:
                        replay.close()
                self.assertEqual(replay.plugin.returncode, 0)

    def test_the_specification_quotes_them(self):
        specification = (ROOT / "protocol/README.md").read_text()
        for name in EXAMPLES.glob("*.jsonl"):
            self.assertIn(name.read_text(), specification, f"{name.name} is not quoted word for word")


if __name__ == "__main__":
    unittest.main()
