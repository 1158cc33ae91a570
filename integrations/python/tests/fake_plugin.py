#!/usr/bin/env python3
"""A plugin without QEMU: speaks the protocol over a pretended VM, with faults on demand.

It shares no code with the host. FAKE_VM is the VM's folder: `<disk>.img` is what the
guest has now, `<disk>@<chain>+<checkpoint>.img` what it had at a checkpoint, which is
all that a dirty bitmap has to tell. FAKE_FAULT names what goes wrong.
FAKE_FAULT's words: see the tests that use them.
"""
import base64
import hashlib
import json
import os
import struct
import sys
import time
import zlib

VM = os.environ["FAKE_VM"]
FAULT = os.environ.get("FAKE_FAULT", "")
BLOCK = 65536
IN, OUT = sys.stdin.buffer, sys.stdout.buffer
carrier = "framed"
backups, restores, delayed = {}, {}, []


def send(message, payload=None):
    message = dict({"jsonrpc": "2.0"}, **message)
    if payload is not None:
        message["payload_bytes"] = len(payload)
    OUT.write(json.dumps(message).encode() + b"\n" + (payload or b""))
    OUT.flush()


def result(request, value):
    send({"id": request["id"], "result": dict(value, member_of_a_later_version=[1])})


def error(request, code, action, **more):
    send({"id": request["id"], "error": {"code": -32000, "message": "fake " + code, "data": dict(
        more, code=code, action=action, state_left="unchanged")}})


def record(request, value, payload=None):
    params = {"stream": request["id"], "record": value}
    if payload is not None and carrier == "inline":
        params["data"] = base64.b64encode(payload).decode()
        payload = None
    send({"method": "record", "params": params}, payload)


def image(disk, checkpoint=None):
    name = disk + ("@" + checkpoint if checkpoint else "")
    return os.path.join(VM, name.replace("/", "%") + ".img")


def load(path):
    with open(path, "rb") as file:
        return file.read()


def disks():
    return sorted(name[:-4].replace("%", "/") for name in os.listdir(VM)
                  if name.endswith(".img") and "@" not in name)


def checkpoints(disk):
    """As chain+name."""
    prefix = os.path.basename(image(disk))[:-4] + "@"
    return sorted(name[len(prefix):-4] for name in os.listdir(VM) if name.startswith(prefix))


def identity(content):
    return hashlib.sha256(content).hexdigest()[:10]


def info(disk, checkpoint):
    chain, _, name = checkpoint.rpartition("+")
    return {"checkpoint": name, "chain": chain, "id": identity(load(image(disk, checkpoint))),
            "health": "inconsistent" if FAULT == "inconsistent" else "usable", "time_ms": 1,
            "dirty_bytes": 0, "granularity": BLOCK, "persistent": True, "recording": True,
            "memory_bytes": 1}


def of_chain(disk, params):
    found = [info(disk, checkpoint) for checkpoint in checkpoints(disk)]
    return [each for each in found if params.get("all_chains") or each["chain"] == params["chain"]]


def list_checkpoints(request, params):
    result(request, {"disks": [{"disk": disk, "size": os.path.getsize(image(disk)),
                                "tracking": "persistent", "checkpoints": of_chain(disk, params)
                                + [{"checkpoint": "theirs", "health": "foreign"}]}
                               for disk in disks()]})


def repair(request, params):
    answer = []
    for disk in disks():
        lost = [each for each in of_chain(disk, params) if each["health"] != "usable"]
        for each in lost:
            os.unlink(image(disk, each["chain"] + "+" + each["checkpoint"]))
        usable = of_chain(disk, params)
        removed = ["bitmap of " + each["checkpoint"] for each in lost]
        answer.append({"disk": disk, "removed": removed, "lost": lost, "usable": usable,
                       "foreign": ["theirs"],
                       "leftovers": ["stuck: no"] if FAULT == "stuck" else []})
    result(request, {"disks": answer, "open_backups": ["b7"]})


def hello(request, params):
    global carrier
    carrier = params.get("carrier", "inline")
    if FAULT == "version":
        return error(request, "version_unsupported", "ask_operator", supported=[2])
    result(request, {"protocol": 1, "plugin": {"name": "fake", "version": "1"},
                     "carrier": carrier, "carriers": ["inline", "framed"], "features": ["odd"],
                     "limits": {"max_line_bytes": 16 << 20, "max_payload_bytes": 1 << 20,
                                "max_requests": 8, "max_name_bytes": 64}})


def inspect(request, params):
    if FAULT == "monitor_busy":
        return error(request, "monitor_busy", "retry")
    result(request, {
        "qemu_version": "10.0.2", "name": "fake", "uuid": os.environ.get("FAKE_UUID"),
        "status": "running", "our_objects": [],
        "disks": [{"disk": disk, "node": "n", "format": "qcow2", "file": None,
                   "size": os.path.getsize(image(disk)), "qdev": None, "iothread": None,
                   "tracking": "persistent",
                   "excluded": "read_only" if disk.startswith("cd") else None}
                  for disk in disks()]})


def plan(params):
    """(disk, base, its file's name, reason of a full) of each disk."""
    for choice in params["disks"]:
        disk, base = choice["disk"], choice.get("base")
        size = os.path.getsize(image(disk))
        reason = None
        there = "%s+%s" % (params.get("chain", "default"), base)
        if base and there not in checkpoints(disk):
            reason = "bitmap_lost" if choice.get("base_id") else "base_missing"
        elif base and FAULT == "inconsistent":
            reason = "base_inconsistent"
        elif base and os.path.getsize(image(disk, there)) != size:
            reason = "size_changed"
        elif base and choice.get("base_id") not in (None, identity(load(image(disk, there)))):
            reason = "base_mismatch"
        elif base and FAULT == "later_reason":
            reason = "a_later_reason"
        yield disk, base, there, reason


def estimate(request, params):
    answer = []
    for disk, base, _, reason in plan(params):
        size = os.path.getsize(image(disk))
        mode = "incremental" if base and not reason else "full"
        answer.append({"disk": disk, "size": size, "planned": "incremental" if base else "full",
                       "mode": mode, "changed_bytes": size, "read_bytes": 4096})
        if reason:
            answer[-1]["reason"] = reason
    result(request, {"disks": answer})


def begin(request, params):
    opened = []
    for disk, base, there, reason in plan(params):
        size = os.path.getsize(image(disk))
        if reason and params.get("strict"):
            return error(request, "base_unusable", "take_full", reason=reason, disk=disk)
        shown = {"disk": disk, "size": size, "planned": "incremental" if base else "full",
                 "mode": "incremental" if base and not reason else "full",
                 "checkpoint": params.get("checkpoint"), "tracking": "persistent",
                 "checkpoint_id": identity(load(image(disk))),
                 "granularity": BLOCK, "changed_bytes": size}
        if reason:
            shown["reason"] = reason
        elif base:
            shown["base"] = base
        opened.append(shown)
    backups["b1"] = {each["disk"]: dict(each, now=load(image(each["disk"])), chain=params["chain"])
                     for each in opened}
    result(request, {"backup": "b1", "time_ms": int(time.time() * 1000), "disks": opened})


def read(request, params):
    disk = backups[params["backup"]][params["disk"]]
    now = disk["now"]
    head = {"kind": "begin", "format": 1, "later": True}
    head.update({name: disk[name] for name in
                 ("disk", "size", "mode", "reason", "base", "checkpoint", "granularity")
                 if name in disk})
    if FAULT == "other_size":
        head["size"] += 1
    record(request, head)
    send({"method": "progress", "params": {"stream": request["id"], "disk": disk["disk"]}})
    send({"method": "of_a_later_version", "params": {}}, b"{\n raw bytes\n")
    send({"method": "vm", "params": {"backup": "b1", "event": "paused"}})
    digest = hashlib.sha256("\n".join([
        "qemu-fleece stream 1", disk["disk"], str(disk["size"]), disk["mode"],
        disk.get("base", ""), disk["checkpoint"] or "", ""]).encode())
    sums = {"records": 0, "data_bytes": 0, "zero_bytes": 0, "same_bytes": 0}
    before = None
    if "base" in disk:
        before = load(image(disk["disk"], disk["chain"] + "+" + disk["base"]))
    for offset in range(0, len(now), BLOCK):
        payload = now[offset:offset + BLOCK]
        kind, crc = "data", zlib.crc32(payload)
        if before is not None and before[offset:offset + BLOCK] == payload:
            kind, crc = "same", 0
        elif not any(payload):
            kind, crc = "zero", 0
        value = {"kind": kind, "offset": offset, "length": len(payload), "later": "x"}
        if kind == "data":
            value["crc32"] = crc
        sums["records"] += 1
        sums[kind + "_bytes"] += len(payload)
        digest.update(struct.pack(">cQQI", kind[:1].encode(), offset, len(payload), crc))
        if offset and FAULT == "die":
            send({"method": "record", "params": {"stream": request["id"], "record": value},
                  "payload_bytes": 99999})
            os.kill(os.getpid(), 9)
        if offset and FAULT == "failed":
            record(request, {"kind": "failed", "code": "nbd_refused", "action": "retry",
                             "offset": offset})
            return error(request, "nbd_refused", "retry", offset=offset, disk=disk["disk"])
        if offset and FAULT == "hang":
            return None
        if offset and FAULT == "bad_crc" and kind == "data":
            payload = bytes(len(payload))
        if FAULT == "lost_record" and offset == BLOCK:
            continue
        record(request, value, payload if kind == "data" else None)
    if FAULT != "no_end":
        record(request, dict(sums, kind="end", digest=digest.hexdigest()))
    answer = {"digest": digest.hexdigest(), "read_bytes": 1, "scratch_peak": 0, "duration_ms": 1}
    if FAULT == "reverse":
        delayed.append((request, answer))
        if len(delayed) == len(backups["b1"]):
            for each in reversed(delayed):
                result(*each)
    else:
        result(request, answer)


def commit(request, params):
    if FAULT == "commit_dies_before":
        os._exit(70)
    for name, disk in backups["b1"].items():
        if disk["checkpoint"]:
            with open(image(name, disk["chain"] + "+" + disk["checkpoint"]), "wb") as file:
                file.write(disk["now"])
        for old in params.get("delete_checkpoints", []):
            old = image(name, disk["chain"] + "+" + old)
            if os.path.exists(old):
                os.unlink(old)
    if FAULT == "commit_dies_after":
        os._exit(70)
    if FAULT == "commit_silent" and not delayed:
        delayed.append(request)
        return
    result(request, {"committed": list(backups["b1"]), "deleted": [], "leftovers": []})


def restore_begin(request, params):
    if os.path.lexists(params["target"]):
        return error(request, "target_exists", "fix_request")
    restores["r1"] = dict(params, bytes=bytearray(params["size"]), streams=0, last=None)
    result(request, {"restore": "r1"})


def restore_write(request, params):
    if "r1" not in restores:
        return error(request, "unknown_restore", "fix_request")
    restore, value = restores["r1"], params["record"]
    if FAULT == "restore_damaged" and value["kind"] == "end":
        del restores["r1"]
        return error(request, "stream_damaged", "ask_operator", stream=restore["streams"], offset=7)
    start, length = value.get("offset", 0), value.get("length", 0)
    if value["kind"] == "begin":
        assert value.get("base") == restore["last"], "the chain is in disorder"
        restore["last"] = value.get("checkpoint")
    elif value["kind"] == "data":
        restore["bytes"][start:start + length] = request["payload"]
    elif value["kind"] == "zero":
        restore["bytes"][start:start + length] = bytes(length)
    elif value["kind"] == "end":
        restore["streams"] += 1
    result(request, {"offset": start + length})


def restore_finish(request, params):
    restore = restores.pop("r1")
    with open(restore["target"], "wb") as file:
        file.write(restore["bytes"])
    result(request, {"target": restore["target"], "size": restore["size"], "data_bytes": 0,
                     "streams": restore["streams"], "checkpoint": restore["last"]})


def main():
    if FAULT == "flood":
        sys.stderr.write("noise\n" * (10 * 1024 * 1024 // 6))
        sys.stderr.flush()
    if FAULT == "not_json":
        OUT.write(b"Welcome!\n")
        OUT.flush()
    methods = {"hello": hello, "vm.inspect": inspect, "checkpoint.list": list_checkpoints,
               "checkpoint.repair": repair, "backup.estimate": estimate,
               "backup.begin": begin, "backup.read": read, "backup.commit": commit,
               "restore.begin": restore_begin,
               "restore.write": restore_write, "restore.finish": restore_finish}
    for line in IN:
        request = json.loads(line.decode())
        params = request.get("params", {})
        request["payload"] = IN.read(request["payload_bytes"]) if "payload_bytes" in request else (
            base64.b64decode(params["data"]) if "data" in params else None)
        if request["method"] == "shutdown":
            result(request, {"aborted": [], "leftovers":
                             ["job x"] if FAULT == "leftover" else []})
            return 0
        methods[request["method"]](request, params)
    return 3


if __name__ == "__main__":
    sys.exit(main())
