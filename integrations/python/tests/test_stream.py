import io
import unittest

from fleece_host.stream import Checker, Damage, StreamFailed, read_chain, read_stream, write_record

from .streams import FULL, begin, data, end, same, stored, whole, zero

INCREMENTAL = whole(begin(mode="incremental", base="monday", checkpoint="tuesday"),
                    same(0, 4), data(4, b"more"), zero(8, 4))


def read(raw):
    return list(read_stream(io.BytesIO(raw)))


class Good(unittest.TestCase):
    def test_the_digest_is_the_specifications_example(self):
        self.assertEqual(FULL[-1][0]["digest"],
                         "c760b76bc995d1a12e14b1ef6b183193e8104184aef32629ecb8b4c4ab9973cc")
        self.assertEqual(read(stored(FULL)), FULL)

    def test_an_incremental_stands_alone(self):
        self.assertEqual(read(stored(INCREMENTAL)), INCREMENTAL)

    def test_a_disk_of_no_bytes_has_no_record(self):
        self.assertEqual(len(read(stored(whole(begin(size=0))))), 2)

    def test_members_of_later_versions_and_nulls_are_borne(self):
        head, _ = begin(base=None, reason="of_a_later_version", later=[1], offset=0)
        self.assertEqual(len(read(stored(whole((head, None), zero(0, 12))))), 3)

    def test_what_is_written_reads_back(self):
        file = io.BytesIO()
        sizes = [write_record(file, *pair) for pair in FULL]
        self.assertEqual(sum(sizes), len(file.getvalue()))
        self.assertEqual(read(file.getvalue()), FULL)

    def test_text_that_is_no_ascii_counts_as_utf8_in_the_digest(self):
        self.assertEqual(len(read(stored(whole(begin(disk="dîsk \u2603"), zero(0, 12))))), 3)


class Broken(unittest.TestCase):
    def refused(self, raw, offset, what):
        with self.assertRaises(Damage) as caught:
            read(raw)
        self.assertIn(what, caught.exception.what)
        self.assertEqual(caught.exception.offset, offset)

    def breaks(self, pairs, offset, what):
        self.refused(stored(pairs), offset, what)

    def test_cut_off_anywhere_it_is_refused(self):
        raw = stored(FULL)
        for length in range(len(raw)):
            with self.assertRaises(Damage):
                read(raw[:length])

    def test_cut_off_names_where(self):
        raw = stored(FULL[:2])
        self.refused(raw[:-1], 0, "inside a payload")
        self.refused(raw, 4, "no `end`")
        self.refused(stored(FULL)[:-1], 12, "inside a line")
        self.refused(b"", 0, "no `end`")

    def test_payload(self):
        self.refused(stored(FULL).replace(b"\ndata", b"\ndatA"), 0, "CRC-32")
        record, payload = data(0, b"data")
        self.breaks([begin(), (dict(record, length=3), b"dat")], 0, "CRC-32")
        self.breaks([begin(), (dict(record, length=1 << 21), b"")], 0, "bytes")
        checker = Checker()
        checker.take(*begin())
        for bad in (None, b"dat", b"data!"):
            with self.assertRaises(Damage):
                checker.take(record, bad)
        with self.assertRaises(Damage):
            checker.take(zero(0, 4)[0], b"data")

    def test_order(self):
        self.breaks(whole(begin(), data(0, b"data"), zero(5, 7)), 4, "gap")
        self.breaks(whole(begin(), data(0, b"data"), zero(3, 9)), 4, "overlap")
        self.breaks(whole(begin(), zero(4, 8), data(0, b"data")), 0, "gap")
        self.breaks(whole(begin(), zero(0, 13)), 0, "past the disk's")
        self.breaks(whole(begin(), zero(0, 0), zero(0, 12)), 0, "empty")
        self.breaks(whole(begin(), zero(0, 11)), 11, "ends although")
        self.breaks(whole(begin(), zero(0, (1 << 63) + 1)), 0, "length")
        self.breaks([FULL[1]] + FULL, 0, "starts with one `begin`")
        self.breaks([FULL[0]] + FULL, 0, "starts with one `begin`")
        self.breaks([FULL[0], ({"kind": "more"}, None)], 0, "unknown kind")

    def test_mode(self):
        self.breaks(whole(begin(), same(0, 12)), 0, "`same` record in a full")
        self.breaks(whole(begin(base="sunday"), zero(0, 12)), 0, "yet has the base")
        self.breaks(whole(begin(mode="incremental"), zero(0, 12)), 0, "no base")
        self.breaks(whole(begin(mode="half"), zero(0, 12)), 0, "mode")
        self.breaks(whole(begin(format=2), zero(0, 12)), 0, "format")
        self.breaks(whole(begin(offset=4), zero(4, 8)), 0, "goes on")

    def test_end(self):
        head, ranges = begin()[0], FULL[1:3]
        for member in ("records", "data_bytes", "zero_bytes", "same_bytes"):
            self.breaks(FULL[:3] + [end(head, ranges, **{member: 1 << 20})], 12, member)
        self.breaks(FULL[:3] + [end(head, ranges, digest="0" * 64)], 12, "digest")
        self.breaks(FULL[:3] + [end(dict(head, checkpoint="sunday"), ranges)], 12, "digest")
        missing = dict(FULL[-1][0])
        del missing["records"]
        self.breaks(FULL[:3] + [(missing, None)], 12, "records")

    def test_failed(self):
        failed = {"kind": "failed", "code": "nbd_closed", "action": "retry", "offset": 4}
        self.breaks(FULL[:2] + [(failed, None)], 4, "nbd_closed")
        checker = Checker()
        checker.take(*begin())
        with self.assertRaises(StreamFailed):
            checker.take(failed)

    def test_lines(self):
        head = stored([begin()])
        for bad in (b"\n", b"{}\n", b"[]\n", b"null\n", b"{\"kind\": \"zero\"\n", b"\xff\xfe{}\n",
                    b"[" * 60000 + b"\n", b"9" * 60000 + b"\n",
                    b'{"kind":"zero","offset":0.0,"length":12}\n',
                    b'{"kind":"zero","offset":false,"length":12}\n',
                    b'{"kind":"data","offset":0,"length":true,"crc32":1}\n'):
            self.refused(head + bad, 0, "")
        self.refused(head + b" " * 65537 + b"\n", 0, "too long")
        self.refused(stored([begin(disk="\ud800")]), 0, "disk")


class Chains(unittest.TestCase):
    def refused(self, streams, stream, what):
        with self.assertRaises(Damage) as caught:
            list(read_chain(io.BufferedReader(io.BytesIO(b"".join(map(stored, streams))))))
        self.assertIn(what, caught.exception.what)
        self.assertEqual((caught.exception.stream, caught.exception.offset), (stream, 0))

    def test_a_full_then_what_builds_on_it(self):
        raw = stored(FULL) + stored(INCREMENTAL)
        pairs = list(read_chain(io.BufferedReader(io.BytesIO(raw))))
        self.assertEqual(pairs, FULL + INCREMENTAL)

    def test_links_that_do_not_fit(self):
        def link(**changes):
            head = dict({"mode": "incremental", "base": "monday"}, **changes)
            return whole(begin(**head), same(0, head.get("size", 12)))
        self.refused([INCREMENTAL], 0, "starts with a full")
        self.refused([FULL, link(base="sunday")], 1, "base")
        self.refused([FULL, link(disk="disk1")], 1, "disk")
        self.refused([FULL, link(size=16)], 1, "bytes")
        self.refused([FULL, FULL], 1, "base")
        self.refused([FULL, INCREMENTAL, INCREMENTAL], 2, "base")
        self.refused([whole(begin(checkpoint=None), zero(0, 12)), link()], 1, "base")
        self.refused([FULL, [({}, None)]], 1, "begin")


if __name__ == "__main__":
    unittest.main()
