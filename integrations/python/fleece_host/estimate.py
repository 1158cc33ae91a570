"""What the next backup would be and read, without a point in time."""
from . import checkpoints
from .backup import choice, choose_bases, left_out


def run(plugin, store, options):
    """(the plugin's word on each disk, lines on those that are left out)."""
    vm = plugin.call("vm.inspect", {"monitor": options.monitor})
    request, known = {"monitor": options.monitor}, {}
    if store.is_new():
        # The first backup makes it; there is nothing to build on.
        options.full = True
    else:
        store.check({"name": vm.get("name"), "uuid": vm.get("uuid")})
        request["chain"] = store.identity()["id"]
        known = checkpoints.of_disks(plugin, options.monitor, request["chain"])
    bases = choose_bases(store, vm, known, options)
    request["disks"] = [choice(disk, base) for disk, base in bases.items()]
    return plugin.call("backup.estimate", request)["disks"], left_out(vm, options)
