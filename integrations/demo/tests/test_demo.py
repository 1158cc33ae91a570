"""The demo's comparison must see one byte."""

import pathlib
import subprocess
import sys
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from demo import same  # noqa: E402


class Comparison(unittest.TestCase):
    def test_one_byte_and_one_length(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            truth = folder / "truth"
            truth.write_bytes(bytes(8 << 20))
            image = folder / "image"
            for content, equal in [(bytes(8 << 20), True), (bytes((8 << 20) - 1) + b"x", False),
                                   (bytes((8 << 20) - 512), False), (bytes((8 << 20) + 512), False)]:
                image.write_bytes(content)
                self.assertEqual(same(image, "raw", truth), equal)
                qcow2 = folder / "qcow2"
                if len(content) % 512 == 0:
                    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, qcow2], check=True)
                    self.assertEqual(same(qcow2, "qcow2", truth), equal)


if __name__ == "__main__":
    unittest.main()
