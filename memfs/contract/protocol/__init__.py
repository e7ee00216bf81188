"""The protocol between memfs and the owners of files. For a VMM: `connect`, and what notifications can say."""

from __future__ import annotations

from memfs.contract.protocol.client import Client, StoreGone, connect, socket_of
from memfs.contract.protocol.messages import (
    ConvertBegin,
    ConvertEnd,
    Fallocate,
    FileId,
    InvalidateBegin,
    InvalidateEnd,
    Notification,
    PfnReply,
    PfnRun,
    Registered,
)

__all__ = [
    "Client",
    "ConvertBegin",
    "ConvertEnd",
    "Fallocate",
    "FileId",
    "InvalidateBegin",
    "InvalidateEnd",
    "Notification",
    "PfnReply",
    "PfnRun",
    "Registered",
    "StoreGone",
    "connect",
    "socket_of",
]
