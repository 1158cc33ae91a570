"""The shared streams of protocol/vectors: what any reader must accept, and refuse where."""
import json
import os
import unittest

from fleece_host.stream import Damage, read_chain

HERE = os.path.dirname(os.path.abspath(__file__))
VECTORS = os.path.join(HERE, "..", "..", "..", "protocol", "vectors")


class Vectors(unittest.TestCase):
    def test_each_is_judged_as_its_index_says(self):
        with open(os.path.join(VECTORS, "index.json"), encoding="utf-8") as file:
            index = json.load(file)
        self.assertTrue(any(each["valid"] for each in index))
        self.assertTrue(any(not each["valid"] for each in index))
        for each in index:
            with self.subTest(each["file"]), \
                    open(os.path.join(VECTORS, each["file"]), "rb") as stream:
                if each["valid"]:
                    for _ in read_chain(stream):
                        pass
                    continue
                with self.assertRaises(Damage) as caught:
                    for _ in read_chain(stream):
                        pass
                found = caught.exception
                self.assertEqual((found.stream, found.offset), (each["stream"], each["offset"]),
                                 "%s; found: %s" % (each.get("what"), found.what))


if __name__ == "__main__":
    unittest.main()
