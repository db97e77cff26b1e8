"""Whether a Ray cluster answers at an address, and lets us in: said within seconds, where Ray itself waits for minutes."""

from __future__ import annotations

import os
import socket

from pipelines.engine.errors import EngineError

ANSWER_SECONDS = 6.0  # to connect, and as long again to greet


def check_address(address: str) -> None:
    """EngineError unless something answers there; ``ray.init`` alone waits for minutes, then ends the process."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise EngineError(
            f"address={address}: expected host:port of a Ray head (usually port 6379). To reach a cluster from "
            f"outside, send the whole command there: athanor submit cluster=ray address=http://HOST:8265 -- run ..."
        )
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS) as connection:
            if not os.environ.get("RAY_USE_TLS"):
                _expect_grpc(connection)
    except OSError as error:
        raise EngineError(
            f"address={address}: no Ray cluster answers there ({error.strerror or error}). Check that it runs (ray "
            f"status) and that this machine may reach it, or leave the address out to start Ray on this machine."
        ) from error


def check_same(address: str, joined: str) -> None:
    """EngineError if this process already belongs to another cluster than the one it is asked to use."""
    if address != "auto" and address.rpartition(":")[2] != joined.rpartition(":")[2]:
        raise EngineError(
            f"address={address}: this process already belongs to the Ray cluster at {joined}, and Ray allows one. Leave "
            f"the address out to use that one, or start the command by itself."
        )


def _expect_grpc(connection: socket.socket) -> None:
    """OSError unless the other end greets like a Ray head: gRPC, which is HTTP/2, opens with SETTINGS."""
    settings = 4
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, settings, 0, 0, 0, 0, 0]))
    greeting = connection.recv(9)
    if len(greeting) < 4 or greeting[3] != settings:
        raise OSError("something else listens on this port")
