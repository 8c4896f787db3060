"""Real Ray nodes on this machine, started as `cluster up --local` starts them."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path

from cluster.environment import MARK
from cluster.machine import free_port, this_machine
from cluster.operate.children import Child, sweep
from cluster.operate.ray_nodes import is_started, node_children, node_environment, node_names

START_TIMEOUT_S = 60.0
POLL_S = 0.05
WITH_DASHBOARD = {"--include-dashboard=false": "--include-dashboard=true"}


class RayCluster:
    """`num_nodes` nodes; the first is the head. `reconnect_timeout_s`: they end when their head is away for so long."""

    def __init__(self, num_nodes: int, reconnect_timeout_s: int, *, dashboard: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ft-", dir="/tmp"))
        self.run_id = secrets.token_hex(8)
        self.names = node_names(num_nodes)
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        token = secrets.token_hex(32)
        tuned = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(reconnect_timeout_s)}
        self.environment = node_environment(
            os.environ | tuned, token=token, folder=self.folder, mark={MARK: self.run_id}
        )
        self.nodes = node_children(
            num_nodes,
            port=port,
            folder=self.folder,
            logs=self.folder,
            environment=self.environment,
            machine=this_machine(),
        )

        if dashboard:
            self.head.command = [WITH_DASHBOARD.get(option, option) for option in self.head.command]

    @property
    def dashboard_address(self) -> str:
        (port,) = [option.rpartition("=")[2] for option in self.head.command if option.startswith("--dashboard-port=")]
        return f"127.0.0.1:{port}"

    @property
    def head(self) -> Child:
        return self.nodes[0]

    def start(self, *nodes: Child) -> None:
        """Start some nodes, by default all, and wait until they run."""
        wanted = nodes or tuple(self.nodes)
        for group in (
            [node for node in wanted if node is self.head],
            [node for node in wanted if node is not self.head],
        ):
            for node in group:
                node.start()
            deadline = time.monotonic() + START_TIMEOUT_S
            while not all(map(is_started, group)):
                for node in group:
                    node.check()
                assert time.monotonic() < deadline, "Ray's nodes do not start"
                time.sleep(POLL_S)

    def kill(self, node: Child) -> None:
        node.end_session()

    def close(self) -> None:
        for node in self.nodes:
            node.end_session()
        sweep(self.run_id)
        shutil.rmtree(self.folder, ignore_errors=True)
