"""The command line."""
import argparse
import os
import shutil
import signal
import sys

from . import VERSION, backup, checkpoints, estimate, report, restore, verify
from .plugin import Plugin, PluginError, PluginGone
from .store import Store, StoreError
from .stream import Damage, StreamFailed

FAILURES = (backup.BackupFailed, backup.NotCommitted, restore.RestoreFailed, StoreError,
            PluginError, PluginGone, Damage, StreamFailed, TimeoutError, OSError)
EXAMPLES = """\
the first backup, and every later one (incremental by itself):
  qemu-fleece-host backup --qmp /run/vm/qmp.sock --to /backup/vm
a disk of the newest backup as an image:
  qemu-fleece-host restore /backup/vm --disk disk0 --output disk0.raw
after a crash of the VM or its machine:
  qemu-fleece-host repair --qmp /run/vm/qmp.sock --to /backup/vm

exit status: 0 all is well, 1 failed, 2 wrong usage"""


ABOUT_ESTIMATE = """\
Says of each disk whether the next backup to DIR would be incremental, or why it would be
full, about how much it would read, and how much at most. Changes nothing."""
ABOUT_CHECKPOINTS = """\
Lists the checkpoints in the VM: `usable` ones can be built on, any other health says why not.
`changed` is what was written since, `memory` what the checkpoint takes in QEMU at most.
Changes nothing."""
ABOUT_REPAIR = """\
For after a crash of QEMU or its machine; safe at any time. Removes checkpoints that are
inconsistent and so of no use to anybody, says what is lost and what is still a base, and
with --to what the next backup will be. Those of other programs are named, never touched.
The exit status is 1 where something could not be removed."""


def parser():
    top = argparse.ArgumentParser(
        prog="qemu-fleece-host", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Backs a running QEMU VM up into a directory, incrementally and for ever.")
    top.add_argument("--version", action="version", version="%(prog)s " + VERSION)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    asks = argparse.ArgumentParser(add_help=False)
    asks.add_argument("--plugin", metavar="PATH", help="the plugin's binary (default: "
                      "$QEMU_FLEECE, else qemu-fleece from PATH)")
    asks.add_argument("--inline", action="store_true",
                      help="bytes as base64 in JSON: slow, for looking at the conversation")

    vm = argparse.ArgumentParser(add_help=False, parents=[asks])
    vm.add_argument("--qmp", required=True, metavar="SOCKET",
                    help="QEMU's monitor: a path, unix:/path, tcp:host:port or tls:...")
    wants = argparse.ArgumentParser(add_help=False, parents=[vm])
    wants.add_argument("--to", required=True, metavar="DIR",
                       help="this VM's directory; the first backup makes it")
    wants.add_argument("--disk", action="append", metavar="ID",
                       help="only this disk (may be repeated; default: all that can be backed up)")
    wants.add_argument("--full", action="store_true", help="read all, build on no earlier backup")

    make = commands.add_parser("backup", parents=[wants], help="back a VM up")
    make.add_argument("--strict", action="store_true",
                      help="fail where an incremental turns out to be impossible")
    make.add_argument("--keep", type=_count, metavar="N", help="then remove all but the newest N "
                      "backups of each disk, and what these build on")
    held = make.add_mutually_exclusive_group()
    held.add_argument("--freeze", metavar="SOCKET",
                      help="freeze file systems for the instant, by the guest agent at this "
                      "socket; fail where that cannot be")
    held.add_argument("--try-freeze", metavar="SOCKET",
                      help="as --freeze, and go on without where that cannot be")
    held.add_argument("--pause", action="store_true", help="pause the VM for the instant")
    make.add_argument("--scratch-dir", metavar="DIR",
                      help="where the plugin keeps old data of blocks that the guest overwrites")

    commands.add_parser("estimate", parents=[wants], help="what the next backup would read",
                        description=ABOUT_ESTIMATE)
    for name, about, more in (
            ("checkpoints", "what the VM remembers, and whether it is still a base",
             ABOUT_CHECKPOINTS),
            ("repair", "remove checkpoints that a crash has left useless", ABOUT_REPAIR)):
        look = commands.add_parser(name, parents=[vm], help=about, description=more)
        whose = look.add_mutually_exclusive_group(required=True)
        whose.add_argument("--to", metavar="DIR", help="those of this directory's backups")
        whose.add_argument("--all", action="store_true", help="those of every host")

    show = commands.add_parser("list", help="what is stored")
    show.add_argument("dir", metavar="DIR")

    back = commands.add_parser("restore", parents=[asks], help="make a disk's image")
    back.add_argument("dir", metavar="DIR")
    back.add_argument("--disk", required=True, metavar="ID")
    back.add_argument("--at", default="latest", metavar="CHECKPOINT",
                      help="a backup's name or checkpoint (default: latest)")
    back.add_argument("--output", required=True, metavar="FILE", help="must not be there yet")
    back.add_argument("--format", choices=("raw", "qcow2"), default="raw")

    check = commands.add_parser("verify", help="check all that is stored, without a VM")
    check.add_argument("dir", metavar="DIR")
    return top


def main(arguments=None):
    """Runs one command; returns the exit status."""
    options = parser().parse_args(arguments)
    command = {"backup": do_backup, "checkpoints": do_checkpoints, "estimate": do_estimate,
               "list": do_list, "repair": do_repair, "restore": do_restore, "verify": do_verify}
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return command[options.command](options)
    except KeyboardInterrupt:
        return _fail("interrupted")
    except FAILURES as error:
        return _fail(error)
    except (KeyError, TypeError, ValueError) as error:
        return _fail("an answer of the plugin or a file has not the form it should: %r" % error)


def do_backup(options):
    progress = report.Progress()
    wanted = backup.Options(_monitor(options), options.disk, options.full, options.strict,
                            options.scratch_dir, _consistency(options))
    store = Store(options.to)
    with store.locked():
        plugin = _plugin(options, progress.notice)
        try:
            manifest = backup.run(plugin, store, wanted, progress)
        finally:
            progress.clear()
            for leftover in plugin.close():
                progress.say("left behind: %s" % leftover)
        print("%s  checkpoint %s" % (manifest["name"], manifest["checkpoint"]))
        print(report.consistency_line(manifest["consistency"]))
        print(report.backup_table(manifest))
        if options.keep:
            for name in store.prune(options.keep):
                print("removed %s" % name)
    return 0


def _consistency(options):
    if options.pause:
        return {"kind": "pause"}
    socket, policy = (options.freeze, "require") if options.freeze else (options.try_freeze, "try")
    return {"kind": "agent", "socket": _address(socket), "policy": policy} if socket else None


def do_estimate(options):
    wanted = backup.Options(_monitor(options), options.disk, options.full)
    with _plugin(options) as plugin:
        _print_estimate(plugin, options, wanted)
    return 0


def do_checkpoints(options):
    with _plugin(options) as plugin:
        disks = checkpoints.listed(plugin, _monitor(options), _chain(options))
        print(report.checkpoint_table(disks))
    return 0


def do_repair(options):
    with _plugin(options) as plugin:
        answer = checkpoints.repaired(plugin, _monitor(options), _chain(options))
        for line in report.repair_lines(answer):
            print(line)
        if options.to:
            print("the next backup:")
            try:
                _print_estimate(plugin, options, backup.Options(_monitor(options)))
            except backup.BackupFailed as error:
                print("not possible now: %s" % error)
    return 1 if any(disk["leftovers"] for disk in answer["disks"]) else 0


def do_list(options):
    store = Store(options.dir)
    vm = store.identity()["vm"]
    print("VM %s  uuid %s" % (vm.get("name") or "without a name", vm.get("uuid") or "none"))
    print(report.store_table(store.backups()))
    for name in store.folders():
        store.backup(name)  # those that the table had to leave out
    return 0


def do_restore(options):
    if os.path.lexists(options.output):
        return _fail("%s exists" % options.output)
    store = Store(options.dir)
    store.find(options.at, options.disk)
    with _plugin(options) as plugin:
        answer = restore.run(plugin, store, options.disk, options.at, options.output,
                             options.format)
    print("%s: %s, %d streams, checkpoint %s" % (
        options.output, report.size(answer["size"]), answer["streams"], answer["checkpoint"]))
    return 0


def do_verify(options):
    streams, problems = verify.run(Store(options.dir), print)
    print("%d streams, %d problems" % (streams, problems))
    return 1 if problems else 0


def _print_estimate(plugin, options, wanted):
    disks, left_out = estimate.run(plugin, Store(options.to), wanted)
    print("\n".join([report.estimate_table(disks), *left_out]))


def _monitor(options):
    return _address(options.qmp)


def _address(socket):
    return socket if socket.startswith(("unix:", "tcp:", "tls:")) else os.path.abspath(socket)


def _chain(options):
    return None if options.all else Store(options.to).identity()["id"]


def _plugin(options, on_notice=None):
    path = options.plugin or os.environ.get("QEMU_FLEECE") or shutil.which("qemu-fleece")
    if not path:
        raise PluginGone("there is no qemu-fleece in PATH: name it with --plugin")
    return Plugin([path], "inline" if options.inline else "framed", on_notice)


def _count(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return value


def _interrupt(*_):
    raise KeyboardInterrupt


def _fail(why):
    print("qemu-fleece-host: %s" % why, file=sys.stderr)
    return 1
