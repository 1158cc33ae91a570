#!/usr/bin/env python3
"""Makes the record-stream vectors beside this file, and index.json, from README section 4 alone.

`make.py DIR` writes them to DIR instead, for the test that holds the committed ones against it.
"""

import hashlib
import json
import pathlib
import struct
import sys
import zlib

GRAIN = 65536


def line(**members):
    return json.dumps(members, separators=(",", ":")).encode() + b"\n"


class Stream:
    """A stream that is put together step by step, and can be spoilt at each."""

    def __init__(self, size, disk="disk0", mode="full", base=None, checkpoint="one", **more):
        begin = {"kind": "begin", "format": 1, "disk": disk, "size": size, "mode": mode}
        begin.update({name: value for name, value in [("base", base), ("checkpoint", checkpoint)] if value})
        begin.update(granularity=GRAIN, **more)
        self.bytes, self.offset, self.records = line(**begin), 0, 0
        self.sums = {"data": 0, "zero": 0, "same": 0}
        text = "".join(f"{part}\n" for part in ["qemu-fleece stream 1", disk, size, mode, base or "", checkpoint or ""])
        self.digest = hashlib.sha256(text.encode())

    def add(self, kind, length, payload, members):
        record = {"kind": kind, "offset": self.offset, "length": length}
        crc32 = 0
        if payload is not None:
            crc32 = zlib.crc32(payload)
            record["crc32"] = crc32
        record.update(members)
        self.bytes += line(**record) + (payload or b"")
        self.digest.update(struct.pack(">cQQI", kind[:1].encode(),
                                       self.offset, length, crc32))
        self.offset += length
        self.records += 1
        self.sums[kind] += length
        return self

    def data(self, payload, **members):
        return self.add("data", len(payload), payload, members)

    def zero(self, count, **members):
        return self.add("zero", count, None, members)

    def same(self, count, **members):
        return self.add("same", count, None, members)

    def end(self, **members):
        record = {"kind": "end", "records": self.records, "data_bytes": self.sums["data"],
                  "zero_bytes": self.sums["zero"], "same_bytes": self.sums["same"], "digest": self.digest.hexdigest()}
        record.update(members)
        self.bytes += line(**record)
        return self.bytes

    def raw(self, more):
        self.bytes += more
        return self


def increment(size=2048, **members):
    return Stream(size, mode="incremental", **{"base": "one", "checkpoint": "two", **members})


A, B = b"a" * 512, b"b" * 512
FULL = Stream(2048).data(A).zero(512, hole=True).data(B).zero(512).end()
INCREMENT = increment().same(512).data(A).zero(512).same(512).end()


def padded(content, length):
    """The same record on a line of exactly `length` bytes: JSON bears spaces behind it."""
    return content.rstrip(b"\n").ljust(length) + b"\n"


def zero(**members):
    """Just a zero record's line, of members that the digest does not know of."""
    return line(kind="zero", **members)


def end_of(stream):
    """Its `end` alone."""
    return stream[stream.rindex(b'{"kind":"end"'):]


def valid():
    yield "full", FULL
    yield "empty_disk", Stream(0).end()
    yield "no_checkpoint", Stream(512, checkpoint=None).data(A).end()
    yield "odd_size", Stream(1001).data(b"x" * 1000).zero(1).end()
    yield "largest_record", Stream(1048576).data(b"\x5a" * 1048576).end()
    yield "huge_sparse", Stream(1 << 60).zero(1 << 60, hole=True).end()
    yield "chain", FULL + INCREMENT
    yield "chain_of_three", FULL + INCREMENT + increment(base="two", checkpoint="three").same(2048).end()
    yield "unknown_members", Stream(512, later={"a": [1]}).data(A, later=None).end(later=True)
    yield "unknown_reason", Stream(512, reason="base_of_later_version").data(A).end()
    spaced = Stream(512).bytes.replace(b'"kind"', b'  "kind" ').replace(b'"disk0"', b'"disk\\u0030"')
    yield "other_formatting", spaced + Stream(512).data(A).end().split(b"\n", 1)[1]
    turned = {name: value for name, value in reversed(json.loads(end_of(Stream(512).data(A).end())).items())}
    yield "other_order", Stream(512).data(A).bytes + line(**turned)
    nulls = Stream(512, reason=None, offset=None).bytes.replace(b'"granularity"', b'"base":null,"granularity"')
    yield "null_members", nulls + Stream(512).zero(512, hole=None).end().split(b"\n", 1)[1]
    yield "defaults_spelled_out", Stream(512, offset=0).zero(512, hole=False).end()
    # The name is escaped in one stream and plain in the other; the digest goes over its UTF-8.
    name = "d\u00efsk \U0001f4be"
    plain = increment(disk=name).same(2048).end().replace(json.dumps(name).encode(), f'"{name}"'.encode())
    yield "name_beyond_ascii", Stream(2048, disk=name).zero(2048).end() + plain
    yield "empty_chain", Stream(0).end() + increment(0).end()
    yield "longest_header", Stream(512).bytes + padded(zero(offset=0, length=512), 65536) \
        + end_of(Stream(512).zero(512).end())
    yield "payload_of_lines", Stream(512).data((b'{"kind":"end"}\n' * 40)[:512]).end()


def damaged():
    """(name, bytes, stream, offset, what)"""
    header = len(Stream(2048).bytes)
    yield "empty", b"", 0, 0, "there is no stream"
    yield "cut_in_first_header", FULL[:20], 0, 0, "cut off in the first line"
    yield "cut_behind_begin", FULL[:header], 0, 0, "nothing behind begin"
    yield "cut_in_header", Stream(2048).data(A).bytes + b'{"kind":"ze', 0, 512, "cut off in a header"
    yield "cut_in_payload", Stream(2048).data(A).data(B).bytes[:-1], 0, 512, "cut off in a payload"
    yield "no_end", Stream(1024).data(A).data(B).bytes, 0, 1024, "complete, but without end"
    yield "cut_in_end", Stream(512).data(A).end()[:-1], 0, 512, "the end's line is not ended"
    yield "bad_crc", Stream(512).data(A, crc32=1).end(), 0, 0, "the payload is not what crc32 says"
    flipped = bytearray(FULL)
    flipped[header + 60] ^= 1
    yield "flipped_bit", bytes(flipped), 0, 0, "one bit of a payload"
    yield "bad_digest", Stream(512).data(A).end(digest="0" * 64), 0, 512, "another digest"
    yield "short_digest", Stream(512).data(A).end(digest=""), 0, 512, "no digest"
    for count in ("records", "data_bytes", "zero_bytes", "same_bytes"):
        yield f"bad_{count}", Stream(512).data(A).end(**{count: 7}), 0, 512, f"another count of {count}"
    yield "other_checkpoint", Stream(512).data(A).end().replace(b'"one"', b'"two"'), 0, 512, "the digest covers begin"
    yield "gap", Stream(2048).data(A).zero(512, offset=1024).end(), 0, 512, "a gap"
    yield "overlap", Stream(2048).data(A).zero(512, offset=256).end(), 0, 512, "an overlap"
    yield "reordered", Stream(1024).data(A, offset=512).data(B, offset=0).end(), 0, 0, "records in another order"
    yield "repeated", Stream(1024).data(A).data(A, offset=0).end(), 0, 512, "a record twice"
    yield "past_the_end", Stream(1024).data(A).zero(1024).end(), 0, 512, "a record reaches past the disk"
    yield "short", Stream(1024).data(A).end(), 0, 512, "end before the end of the disk"
    yield "empty_record", Stream(512).zero(0).data(A).end(), 0, 0, "a record of length 0"
    yield "same_in_full", Stream(512).same(512).end(), 0, 0, "same in a full"
    yield "full_with_base", Stream(512, base="zero").data(A).end(), 0, 0, "a full with a base"
    yield "no_base", FULL + increment(base=None).same(2048).end(), 1, 0, "an incremental without a base"
    over = b"\x5a" * 1048577
    yield "over_long_record", Stream(len(over)).data(over[:1024], length=len(over)).end(), 0, 0, "a record over 1 MiB"
    yield "over_long_header", Stream(512).bytes + padded(zero(offset=0, length=512), 65537) \
        + end_of(Stream(512).zero(512).end()), 0, 0, "a header line over 65536 bytes"
    yield "unknown_kind", Stream(512).raw(line(kind="hole", offset=0, length=512)).end(), 0, 0, "an unknown kind"
    yield "unknown_format", Stream(512).data(A).end().replace(b'"format":1', b'"format":2'), 0, 0, "another format"
    yield "unknown_mode", Stream(512, mode="half").data(A).end(), 0, 0, "an unknown mode"
    yield "no_json", Stream(512).raw(b"data 0 512\n").data(A).end(), 0, 0, "a header that is no JSON"
    yield "array_header", Stream(512).raw(b'["zero",0,512]\n').end(), 0, 0, "a header that is no object"
    yield "nul_in_header", Stream(512).raw(b'{"kind":"zero",\0"offset":0,"length":512}\n').end(), 0, 0, "a NUL in a header"
    yield "bad_utf8", Stream(512).raw(b'{"kind":"zero","x":"\xff","offset":0,"length":512}\n').end(), 0, 0, "no UTF-8"
    yield "two_headers", Stream(512).raw(b'{"kind":"zero","offset":0,"length":256} {}\n').end(), 0, 0, "two on a line"
    yield "twice_a_member", Stream(512).raw(b'{"kind":"zero","offset":0,"length":512,"length":512}\n').end(), 0, 0, \
        "a member twice"
    yield "negative", Stream(512).raw(line(kind="zero", offset=-1, length=512)).end(), 0, 0, "a negative offset"
    yield "float", Stream(512).raw(line(kind="zero", offset=0, length=512.0)).end(), 0, 0, "a length that is no integer"
    yield "over_64_bits", Stream(512).raw(line(kind="zero", offset=0, length=1 << 64)).end(), 0, 0, "over 64 bits"
    yield "wraps_around", Stream(1024).data(A).zero(512, length=(1 << 64) - 512).end(), 0, 512, "offset + length wraps"
    yield "missing_member", Stream(512).raw(line(kind="zero", offset=0)).end(), 0, 0, "no length"
    yield "two_begins", Stream(512).raw(Stream(512).bytes).data(A).end(), 0, 0, "begin twice"
    yield "no_begin", line(kind="zero", offset=0, length=512), 0, 0, "no begin"
    yield "failed", Stream(1024).data(A).bytes + line(kind="failed", code="nbd_closed", action="retry", offset=512), \
        0, 512, "the stream failed"
    yield "goes_on", Stream(1024, offset=512).bytes + line(kind="data", offset=512, length=512, crc32=0) + B, 0, 0, \
        "the part before is missing"
    yield "record_behind_end", FULL + line(kind="zero", offset=0, length=512), 1, 0, "a record behind end"
    yield "newline_behind_end", FULL + b"\n", 1, 0, "an empty line behind end"
    yield "increment_alone", INCREMENT, 0, 0, "a chain that starts with an incremental"
    yield "wrong_base", FULL + increment(base="none").same(2048).end(), 1, 0, "based on another checkpoint"
    yield "wrong_disk", FULL + increment(disk="disk1").same(2048).end(), 1, 0, "of another disk"
    yield "wrong_size", FULL + increment(4096).same(4096).end(), 1, 0, "of another size"
    yield "full_behind_full", FULL + FULL, 1, 0, "a full in the middle of a chain"
    yield "missing_link", FULL + increment(base="two", checkpoint="three").same(2048).end(), 1, 0, "a link is missing"
    yield "no_checkpoint_to_build_on", Stream(2048, checkpoint=None).zero(2048).end() + INCREMENT, 1, 0, \
        "the stream before made no checkpoint"
    yield from more_damaged_members()
    yield from more_damaged_order()
    yield "second_cut", FULL + INCREMENT[:-1], 1, 2048, "the second stream is cut off"


def more_damaged_members():
    """Each one record that says another thing than its rule; the rest of the stream is right."""
    good = Stream(512).data(A).end()
    for name, old, new, what in [
        ("mode_in_object", b'"full"', b'{"full":null}', "a mode that is no text"),
        ("other_mode", b'"full"', b'"Full"', "a mode in another case"),
        ("size_over_63_bits", b'"size":512', b'"size":9223372036854776320', "a size over 2^63"),
        ("size_over_64_bits", b'"size":512', b'"size":18446744073709552128', "a size over 64 bits"),
        ("no_disk", b'"disk":"disk0",', b"", "begin without disk"),
        ("two_disks", b'"disk":', b'"disk":"disk1","disk":', "two members of a name that disagree"),
        ("two_kinds", b'"kind":"data",', b'"kind":"same","kind":"data",', "two kinds"),
        ("length_in_text", b'"length":512', b'"length":"512"', "a number in quotes"),
        ("length_in_exponent", b'"length":512', b'"length":5.12e2', "a length that is no integer"),
        ("boolean_offset", b'"offset":0', b'"offset":false', "a boolean for a number"),
        ("null_offset", b'"offset":0,', b'"offset":null,', "null where a member must be"),
        ("no_crc32", f',"crc32":{zlib.crc32(A)}'.encode(), b"", "data without crc32"),
        ("crc32_over_32_bits", b'"crc32":', b'"crc32":4294967296', "a crc32 over 32 bits"),
        ("trailing_comma", f"{zlib.crc32(A)}}}".encode(), f"{zlib.crc32(A)},}}".encode(), "a comma too many"),
    ]:
        assert good.count(old) == 1, name
        yield name, good.replace(old, new), 0, 0, what
    digest = json.loads(end_of(good))["digest"]
    yield "digest_in_capitals", good.replace(digest.encode(), digest.upper().encode()), 0, 512, "not in lower case"
    yield "digest_missing", good.replace(f',"digest":"{digest}"'.encode(), b""), 0, 512, "end without digest"
    yield "other_data", Stream(512).data(B).bytes + end_of(good), 0, 512, "bytes and crc32 agree, the digest does not"
    turned = INCREMENT.replace(b'"zero","offset":1024', b'"same","offset":1024') \
        .replace(b'"same","offset":1536', b'"zero","offset":1536')
    yield "zero_for_same", FULL + turned, 1, 2048, "zero and same change places, the counts hold"


def more_damaged_order():
    """Records that are each right, and do not belong where they stand."""
    end = end_of(Stream(512).data(A).end())
    failed = line(kind="failed", code="nbd_closed", action="retry", offset=0)
    yield "end_first", end, 0, 0, "end without begin"
    yield "end_twice", Stream(512).data(A).end() + end, 1, 0, "end twice"
    yield "failed_first", failed, 0, 0, "failed without begin"
    yield "failed_behind_begin", Stream(512).bytes + failed, 0, 0, "failed at once"
    yield "failed_at_the_end", Stream(512).data(A).bytes + failed, 0, 512, "all of the disk, and failed"
    yield "failed_and_end", Stream(512).data(A).raw(failed).end(), 0, 512, "failed, and then end"
    later = failed.replace(b"nbd_closed", b"of_a_later_version").replace(b"retry", b"of_a_later_version")
    yield "failed_in_a_new_way", Stream(1024).data(A).bytes + later, 0, 512, "a code that is not known"
    yield "empty_line_first", b"\n" + FULL, 0, 0, "an empty line before begin"
    yield "empty_line_within", Stream(1024).data(A).raw(b"\n").data(B).end(), 0, 512, "an empty line between records"
    yield "empty_data", Stream(512).data(b"").data(A).end(), 0, 0, "a data record of length 0"
    yield "empty_disk_with_record", Stream(0).zero(1).end(), 0, 0, "a record of a disk of 0 bytes"
    yield "one_past_the_end", Stream(1001).data(b"x" * 1000).zero(2).end(), 0, 1000, "one byte past the disk"
    yield "one_short", Stream(1001).data(b"x" * 1000).end(), 0, 1000, "one byte is missing"
    short = Stream(512).data(A[:511]).raw(A[511:]).zero(1).end()
    yield "payload_too_long", short, 0, 511, "a byte behind a payload"
    yield "second_without_records", FULL + increment().bytes, 1, 0, "nothing behind the second begin"
    yield "second_cut_in_begin", FULL + INCREMENT[:20], 1, 0, "cut off in the second begin"
    yield "second_bad_crc", FULL + increment().same(512).data(A, crc32=1).same(1024).end(), 1, 512, "a bad crc32"
    yield "second_gap", FULL + increment().same(512).same(512, offset=1024).end(), 1, 512, "a gap in the second stream"
    yield "second_bad_digest", FULL + INCREMENT[:-4] + b"?" + INCREMENT[-3:], 1, 2048, "another digest in the second"
    yield "second_goes_on", FULL + increment(offset=512).same(1536, offset=512).end(), 1, 0, "its part before is missing"


def main():
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
    folder = folder.parent if folder.suffix == ".py" else folder
    index = []
    for kind in ("valid", "damaged"):
        (folder / kind).mkdir(exist_ok=True)
    for name, content in valid():
        (folder / f"valid/{name}.stream").write_bytes(content)
        index.append({"file": f"valid/{name}.stream", "valid": True})
    for name, content, stream, offset, what in damaged():
        (folder / f"damaged/{name}.stream").write_bytes(content)
        index.append({"file": f"damaged/{name}.stream", "valid": False, "stream": stream, "offset": offset,
                      "what": what})
    (folder / "index.json").write_text("[\n" + ",\n".join(json.dumps(entry) for entry in index) + "\n]\n")


if __name__ == "__main__":
    main()
