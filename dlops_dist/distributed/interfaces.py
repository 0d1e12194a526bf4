"""The network interface that ranks of several machines reach each other by."""

import os
import socket

import psutil


def use_interface_of(address: str) -> None:
    """Let gloo and NCCL use the one that has this address of the machine's, unless the environment names another.

    By themselves they ask what the host's name stands for, which is the loopback on many a host.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if address in (of_interface.address for of_interface in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # = as it is, not all that begin so


def address_towards(host: str) -> str:
    """This machine's address, as another host knows it."""
    family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)  # nothing is sent
        return str(probe.getsockname()[0])
