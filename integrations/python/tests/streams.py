"""Hand-made streams, sound but for what a test changes in them."""
import hashlib
import json
import struct
import zlib


def data(offset, payload):
    return {"kind": "data", "offset": offset, "length": len(payload),
            "crc32": zlib.crc32(payload)}, payload


def zero(offset, length):
    return {"kind": "zero", "offset": offset, "length": length}, None


def same(offset, length):
    return {"kind": "same", "offset": offset, "length": length}, None


def begin(**changes):
    head = {"kind": "begin", "format": 1, "disk": "disk0", "size": 12, "mode": "full",
            "checkpoint": "monday", "granularity": 65536}
    head.update(changes)
    return head, None


def end(head, ranges, **changes):
    """The `end` that is right for any ranges, also for those that break other rules."""
    digest = hashlib.sha256("\n".join([
        "qemu-fleece stream 1", head["disk"], str(head["size"]), head["mode"],
        head.get("base") or "", head.get("checkpoint") or "", ""]).encode())
    last = {"kind": "end", "records": len(ranges), "data_bytes": 0, "zero_bytes": 0,
            "same_bytes": 0}
    for record, _ in ranges:
        last[record["kind"] + "_bytes"] += record["length"]
        digest.update(struct.pack(">cQQI", record["kind"][0].encode(), record["offset"],
                                  record["length"], record.get("crc32", 0)))
    last["digest"] = digest.hexdigest()
    last.update(changes)
    return last, None


def whole(head, *ranges):
    """begin, ranges, end."""
    return [head, *ranges, end(head[0], ranges)]


FULL = whole(begin(), data(0, b"data"), zero(4, 8))


def stored(pairs):
    return b"".join(json.dumps(record).encode() + b"\n" + (payload or b"")
                    for record, payload in pairs)
