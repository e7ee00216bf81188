"""An owner: registers a file on a memfs, and prints which of its pages come and go until it is interrupted.

If memfs is killed and another one goes on in its place (`-o survive=on`), the client comes back to that by itself.

memfs mount /mnt/guest -o size=1g && touch /mnt/guest/private && python examples/owner.py /mnt/guest/private
"""

from __future__ import annotations

import os
import sys

import trio

from memfs.contract.on_memfs import locate
from memfs.contract.protocol import ConvertBegin, InvalidateBegin, Notification, StoreGone, connect, socket_of


async def act(message: Notification) -> None:
    """Act on a notification. memfs frees nothing before this returns, since only then it is acknowledged."""
    if isinstance(message, InvalidateBegin | ConvertBegin):
        pass  # here a VMM unmaps the pages, and has its vCPUs flush their TLBs
    print(type(message).__name__, message.subject["pages"], flush=True)


async def resumed() -> None:
    """Act on the return of memfs. Here a VMM unmaps what it has mapped as shared and the page map shows as private."""
    print("back at memfs", flush=True)


async def own(path: str) -> None:
    """Own a file until the connection ends."""
    with locate(path) as file:  # refuses what does not lie on a memfs
        fd = file.open(os.O_RDWR)
    async with connect(socket_of(fd), "example", act, resumed) as client:
        registered, backing = await client.register(fd)
        for each in backing:  # a VMM maps the backing file and, of a guest-sealed one, the page map
            os.close(each)
        # fd stays open: nothing else keeps the mount, and with it the guest's memory, from being unmounted
        print(f"owner of inode {registered.ino}, {registered.size} bytes", flush=True)
        await client.ended.wait()
        raise StoreGone(client.gone)


if __name__ == "__main__":
    try:
        trio.run(own, sys.argv[1])
    except KeyboardInterrupt:
        sys.exit(130)
    except IndexError:
        sys.exit(f"usage: {sys.argv[0]} FILE")
    except (OSError, StoreGone) as error:
        sys.exit(f"{sys.argv[0]}: {error}")
