"""Check within seconds whether a Ray cluster answers at an address and accepts us; Ray itself would wait for minutes."""

from __future__ import annotations

import os
import socket

from conf.refusal import Refusal
from pipelines.engine.backends import ray_private

ANSWER_SECONDS = 6.0  # to connect, and as long again to greet


def check_address(address: str) -> None:
    """Raise Refusal unless a Ray head answers there; ``ray.init`` alone waits for minutes, then ends the process."""
    if address == "auto":
        address = _running_here()
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise Refusal(
            "compute.address",
            address,
            "expected host:port of a Ray head (usually port 6379)",
            "to reach a cluster from outside, send the whole command there: athanor submit cluster=ray "
            "address=http://HOST:8265 -- run …",
        )
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS) as connection:
            if not os.environ.get("RAY_USE_TLS"):
                _expect_grpc(connection)
                _expect_admission(address)
    except OSError as error:
        raise Refusal(
            "compute.address",
            address,
            f"no Ray cluster answers there ({error.strerror or error})",
            "check that it runs (ray status) and that this machine may reach it, or leave compute.address out to start Ray "
            "on this machine",
        ) from error


def _running_here() -> str:
    """Address of this machine's Ray cluster, as `auto` resolves it."""
    address = ray_private.address_here()
    if address is None:
        raise Refusal(
            "compute.address",
            "auto",
            "no Ray runs on this machine",
            "start one (ray start --head), give the head's host:port, or leave compute.address out",
        )
    return address


def _expect_admission(address: str) -> None:
    """Raise Refusal if the head requires a token that this process does not have: Ray would retry for most of a minute,
    then report that it failed to connect."""
    import grpc

    headers = ray_private.token_headers()
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(ray_private.CHECK_ALIVE)(b"", timeout=ANSWER_SECONDS, metadata=tuple(headers.items()))
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:
                return  # Ray itself reports other errors better
            has = "it is not the token that this process has" if headers else "this process has none"
            raise Refusal(
                "compute.address",
                address,
                f"this Ray cluster asks for a token, and {has}",
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, the file that holds the cluster's token (on its "
                "head: ~/.ray/auth_token, or what RAY_AUTH_TOKEN_PATH says there)",
            ) from error


def check_same(address: str, joined: str) -> None:
    """Raise Refusal if this process already belongs to another cluster than the configured one."""
    if address != "auto" and address.rpartition(":")[2] != joined.rpartition(":")[2]:
        raise Refusal(
            "compute.address",
            address,
            f"this process already belongs to the Ray cluster at {joined}, and Ray allows one",
            "leave compute.address out to use that one, or start the command by itself",
        )


def _expect_grpc(connection: socket.socket) -> None:
    """Raise OSError unless the peer greets like a Ray head: gRPC, which is HTTP/2, opens with SETTINGS."""
    settings = 4
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, settings, 0, 0, 0, 0, 0]))
    greeting = connection.recv(9)
    if len(greeting) < 4 or greeting[3] != settings:
        raise OSError("something else listens on this port")
